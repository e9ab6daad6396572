//! Error messages of servers, and the quirks that can be read from them.

use ecso::ModelError;
use reqwest::StatusCode;
use serde_json::{Map, Value};

use crate::{
    lenient,
    options::MaxTokensField,
    quirks::{Quirk, Quirks},
};

/// Most characters of a message that are searched.
const MAX_SEARCHED: usize = 2000;
/// Most characters of a message that are shown, since it may quote the request.
const MAX_SHOWN: usize = 200;

/// Names of log-probabilities in error messages.
const LOGPROBS: [&str; 5] =
    ["logprobs", "top_logprobs", "logprob", "log probabilities", "log-probabilities"];

/// Fields that may be refused. If an error names several, the first of these is left out.
const FIELDS: [&str; 3] = ["top_p", "seed", "temperature"];

/// Errors about system messages. All words of an entry must be in the message.
const NO_SYSTEM: [&[&str]; 7] = [
    &["system role", "not support"],
    &["support", "system message"],
    &["support", "system prompt"],
    &["not support 'system'"],
    &["only user and assistant roles"],
    &["roles must alternate"],
    &["developer instruction is not enabled"],
];

/// Words in errors about the value of a field, not the field itself.
const VALUE_ERRORS: [&str; 9] = [
    "must be",
    "should be",
    "between",
    "out of range",
    "too large",
    "too high",
    "greater than",
    "less than",
    "exceed",
];

/// Error codes of content filters (OpenAI's, Azure's, Alibaba's), without separators.
const FILTERS: [&str; 5] = [
    "contentfilter",
    "contentpolicyviolation",
    "moderationblocked",
    "datainspectionfailed",
    "responsibleaipolicyviolation",
];

/// An error message of a server.
#[derive(Debug)]
pub(crate) struct Complaint {
    status: StatusCode,
    /// The text.
    message: String,
    /// Its codes and types, in lower-case letters and digits only.
    codes: Vec<String>,
    /// The request fields that it names as parameters.
    params: Vec<String>,
}

impl Complaint {
    /// Reads the body of a response with an error status.
    pub(crate) fn read(status: StatusCode, body: &[u8]) -> Self {
        let text = String::from_utf8_lossy(body);
        let object: Value = lenient::parse(&text).unwrap_or_default();
        // Google's servers put the error in a list.
        let object = object.get(0).unwrap_or(&object);
        let mut complaint = Self::of(status, object);
        if complaint.message.is_empty() {
            complaint.message = beginning(text.trim());
        }
        complaint
    }

    /// Reads an object that is an error or holds one.
    pub(crate) fn of(status: StatusCode, object: &Value) -> Self {
        let error = object.get("error").filter(|error| !error.is_null()).unwrap_or(object);
        let details = object["detail"].as_array().map(Vec::as_slice).unwrap_or_default();
        let texts = [
            &error["message"],
            error,
            &object["message"],
            &object["detail"],
            // OpenRouter's copy of the error of the server behind it.
            &error["metadata"]["raw"],
        ];
        let texts = texts.into_iter().chain(details.iter().map(|detail| &detail["msg"]));
        let mut message: Vec<&str> =
            texts.filter_map(Value::as_str).filter(|text| !text.is_empty()).collect();
        message.dedup();
        let codes = [error, object, &error["innererror"]].into_iter().chain(details);
        let params = [&error["param"]]
            .into_iter()
            .chain(details.iter().filter_map(|detail| detail["loc"].as_array()?.last()));
        Self {
            status,
            message: message.join(": ").chars().take(MAX_SEARCHED).collect(),
            codes: codes
                .flat_map(|object| [&object["code"], &object["type"]])
                .filter_map(Value::as_str)
                .map(without_separators)
                .collect(),
            params: params
                .filter_map(Value::as_str)
                .map(|param| first_word(param).to_owned())
                .collect(),
        }
    }

    /// The beginning of the text.
    pub(crate) fn summary(&self) -> String {
        beginning(&self.message)
    }

    /// Whether a content filter sent it.
    pub(crate) fn is_from_filter(&self) -> bool {
        self.codes.iter().any(|code| FILTERS.contains(&code.as_str()))
    }

    /// The error for a complaint in a response with status 200: in a stream, or instead of a reply.
    pub(crate) fn midway_error(&self) -> ModelError {
        let reason =
            if self.message.is_empty() { "no reason given".to_owned() } else { self.summary() };
        if self.is_from_filter() {
            return ModelError::Filtered(reason.into());
        }
        ModelError::Transport(format!("the server broke off: {reason}").into())
    }

    /// The quirk that it names, if heeding it would change the request.
    pub(crate) fn quirk(
        &self,
        request: &Map<String, Value>,
        limit: MaxTokensField,
    ) -> Option<Quirk> {
        let (is_refusal, is_forbidden) = (self.is_refusal(), self.status == StatusCode::FORBIDDEN);
        if self.is_from_filter() || !(is_refusal || is_forbidden || self.is_breakdown()) {
            return None;
        }
        if !is_forbidden && has_system(request) && self.refuses_system() {
            return Some(Quirk::NoSystem);
        }
        if request.contains_key("logprobs") && LOGPROBS.iter().any(|name| self.names(name)) {
            return Some(Quirk::Without("logprobs"));
        }
        if !is_forbidden && self.refuses("stream_options", request) {
            return Some(Quirk::Without("stream_options"));
        }
        if !is_refusal {
            return None;
        }
        let is_zero = request.get("temperature").and_then(Value::as_f64) == Some(0.0);
        if self.is_about_a_value() {
            return (is_zero && self.names("temperature")).then_some(Quirk::NoZero);
        }
        if limit == MaxTokensField::Auto && self.refuses("max_tokens", request) {
            return Some(Quirk::CompletionTokens);
        }
        FIELDS.into_iter().find(|field| self.refuses(field, request)).map(Quirk::Without)
    }

    /// The optional fields that may be at fault if the message names no field. Empty if it names
    /// one, or if the request has no optional fields.
    pub(crate) fn suspects(&self, request: &Map<String, Value>) -> Quirks {
        let has_logprobs = request.contains_key("logprobs");
        let can_be = self.is_refusal() || (self.is_breakdown() && has_logprobs);
        let others = ["max_tokens", "max_completion_tokens"];
        if self.is_from_filter()
            || !can_be
            || FIELDS.iter().chain(&others).any(|field| self.refuses(field, request))
        {
            return Quirks::new();
        }
        let optional =
            ["logprobs", "stream_options"].into_iter().filter(|field| request.contains_key(*field));
        optional.map(Quirk::Without).collect()
    }

    /// Whether the status blames the request.
    fn is_refusal(&self) -> bool {
        matches!(self.status, StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY)
    }

    /// Whether the server failed, which a request may have caused.
    pub(crate) fn is_breakdown(&self) -> bool {
        matches!(self.status, StatusCode::INTERNAL_SERVER_ERROR | StatusCode::NOT_IMPLEMENTED)
    }

    fn refuses_system(&self) -> bool {
        let text = self.message.to_lowercase();
        NO_SYSTEM.iter().any(|words| words.iter().all(|word| text.contains(word)))
    }

    fn is_about_a_value(&self) -> bool {
        let text = self.message.to_lowercase();
        VALUE_ERRORS.iter().any(|words| text.contains(words))
    }

    fn refuses(&self, field: &str, request: &Map<String, Value>) -> bool {
        request.contains_key(field) && self.names(field)
    }

    /// Whether it is about `field`: by the parameters that it names, or by its text if it names
    /// none.
    fn names(&self, field: &str) -> bool {
        let known = |param: &&String| !matches!(param.as_str(), "" | "body" | "None" | "null");
        if self.params.iter().any(|param| known(&param)) {
            return self.params.iter().any(|param| param == field);
        }
        let text = self.message.to_lowercase();
        let is_part = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
        text.match_indices(field).any(|(at, _)| {
            !is_part(text[..at].chars().next_back())
                && !is_part(text[at + field.len()..].chars().next())
        })
    }
}

/// The beginning of a server's text, short enough to be shown.
pub(crate) fn beginning(text: &str) -> String {
    match text.char_indices().nth(MAX_SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

fn has_system(request: &Map<String, Value>) -> bool {
    let messages = request.get("messages").and_then(Value::as_array);
    messages.is_some_and(|messages| messages.iter().any(|message| message["role"] == "system"))
}

/// The same text for `Content-Filter`, `content_filter` and `ContentFilter`.
fn without_separators(code: &str) -> String {
    code.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect()
}

/// `stream_options` of `stream_options.include_usage`.
fn first_word(param: &str) -> &str {
    param.split(['.', '[']).next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn request() -> Map<String, Value> {
        let request = json!({
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
            "max_tokens": 9, "temperature": 0.0, "top_p": 1.0, "seed": 1, "logprobs": true, "top_logprobs": 5,
            "stream_options": {"include_usage": true},
        });
        request.as_object().unwrap().clone()
    }

    fn quirk(status: u16, body: &Value) -> Option<Quirk> {
        let complaint =
            Complaint::read(StatusCode::from_u16(status).unwrap(), body.to_string().as_bytes());
        complaint.quirk(&request(), MaxTokensField::Auto)
    }

    fn says(message: &str) -> Value {
        json!({"error": {"message": message, "param": null, "code": null}})
    }

    #[test]
    fn a_refusal_names_its_quirk() {
        let not_supported = "Unsupported value: 'temperature' does not support 0 with this model. \
                             Only the default (1) value is supported.";
        for (message, expected) in [
            (
                "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
                Quirk::CompletionTokens,
            ),
            (not_supported, Quirk::Without("temperature")),
            ("`temperature` must be strictly positive", Quirk::NoZero),
            ("Unrecognized request argument supplied: seed", Quirk::Without("seed")),
            (
                "`temperature` and `top_p` cannot both be specified for this model.",
                Quirk::Without("top_p"),
            ),
            ("stream_options is not allowed", Quirk::Without("stream_options")),
            (
                "You are not allowed to request logprobs from this model.",
                Quirk::Without("logprobs"),
            ),
            ("Requested top_logprobs of 20, at most 5 are allowed", Quirk::Without("logprobs")),
            ("System role not supported", Quirk::NoSystem),
            ("This model does not support system messages", Quirk::NoSystem),
            (
                "Conversation roles must alternate user/assistant/user/assistant/...",
                Quirk::NoSystem,
            ),
            ("Only user and assistant roles are supported!", Quirk::NoSystem),
            (
                "Unsupported value: 'messages[0].role' does not support 'system' with this model.",
                Quirk::NoSystem,
            ),
            ("Developer instruction is not enabled for models/gemma-3-27b-it", Quirk::NoSystem),
        ] {
            assert_eq!(quirk(400, &says(message)), Some(expected), "{message}");
            assert_eq!(quirk(422, &says(message)), Some(expected), "{message}");
        }
    }

    #[test]
    fn named_parameters_count_more_than_the_text() {
        let error = json!({"error": {"message": "'temperature' is not supported with 'seed'", "param": "seed"}});
        assert_eq!(quirk(400, &error), Some(Quirk::Without("seed")));
        let error = json!({"error": {"message": "Bad content: 'the temperature is high'", "param": "messages[1].content"}});
        assert_eq!(quirk(400, &error), None);
        let error = json!({"detail": [{"loc": ["body", "logprobs"], "msg": "Extra inputs are not permitted"}]});
        assert_eq!(quirk(422, &error), Some(Quirk::Without("logprobs")));
        let error = json!([{"error": {"message": "Unknown name \"seed\": Cannot find field.", "code": 400}}]);
        assert_eq!(quirk(400, &error), Some(Quirk::Without("seed")));
    }

    #[test]
    fn a_wrong_value_is_not_a_quirk() {
        for message in [
            "'max_tokens' or 'max_completion_tokens' is too large: 9. This model's maximum context length is 5 tokens.",
            "top_p must be in (0, 1], got 2",
            "This model's maximum context length is 5 tokens.",
            "my_temperatures are wrong",
        ] {
            assert_eq!(quirk(400, &says(message)), None, "{message}");
        }
    }

    #[test]
    fn other_statuses_name_fewer_quirks() {
        let logprobs = says("You are not allowed to request logprobs from this model.");
        assert_eq!(quirk(403, &logprobs), Some(Quirk::Without("logprobs")));
        assert_eq!(quirk(500, &logprobs), Some(Quirk::Without("logprobs")));
        assert_eq!(
            quirk(500, &says("Jinja Exception: System role not supported")),
            Some(Quirk::NoSystem)
        );
        for status in [401, 403, 404, 429, 500, 503] {
            assert_eq!(quirk(status, &says("'temperature' is not supported")), None, "{status}");
        }
        for status in [401, 404, 429, 503] {
            assert_eq!(quirk(status, &logprobs), None, "{status}");
        }
    }

    #[test]
    fn optional_fields_are_suspected_only_if_none_is_named() {
        let suspects = |status: u16, message: &str, request: &Map<String, Value>| {
            let body = says(message).to_string();
            Complaint::read(StatusCode::from_u16(status).unwrap(), body.as_bytes())
                .suspects(request)
        };
        let optional = Quirks::from([Quirk::Without("logprobs"), Quirk::Without("stream_options")]);
        assert_eq!(suspects(400, "Bad request", &request()), optional);
        assert_eq!(suspects(500, "Internal server error", &request()), optional);
        assert_eq!(suspects(400, "top_p must be in (0, 1]", &request()), Quirks::new());
        assert_eq!(suspects(400, "max_tokens is too large", &request()), Quirks::new());
        assert_eq!(suspects(403, "Forbidden", &request()), Quirks::new());
        let mut plain = request();
        Quirk::Without("logprobs").apply(&mut plain);
        assert_eq!(suspects(500, "Internal server error", &plain), Quirks::new());
        Quirk::Without("stream_options").apply(&mut plain);
        assert_eq!(suspects(400, "Bad request", &plain), Quirks::new());
    }

    #[test]
    fn filters_are_known_by_their_codes() {
        for body in [
            json!({"error": {"code": "content_filter", "innererror": {"code": "ResponsibleAIPolicyViolation"}}}),
            json!({"error": {"code": "content_policy_violation", "message": "no"}}),
            json!({"error": {"code": "moderation_blocked", "message": "no"}}),
            json!({"error": {"code": "data_inspection_failed", "type": "data_inspection_failed", "message": "no"}}),
            json!({"code": "DataInspectionFailed", "message": "no"}),
            json!({"error": {"code": "400", "message": "no", "innererror": {"code": "ResponsibleAIPolicyViolation"}}}),
        ] {
            assert!(
                Complaint::read(StatusCode::BAD_REQUEST, body.to_string().as_bytes())
                    .is_from_filter(),
                "{body}"
            );
        }
        let other =
            json!({"error": {"code": "invalid_value", "message": "content_filter is no model"}});
        assert!(
            !Complaint::read(StatusCode::BAD_REQUEST, other.to_string().as_bytes())
                .is_from_filter()
        );
    }

    #[test]
    fn a_complaint_is_told_whatever_its_form() {
        for (body, told) in [
            (r#"{"error": {"message": "not so"}}"#, "not so"),
            (r#"{"error": "not so"}"#, "not so"),
            (r#"{"object": "error", "message": "not so"}"#, "not so"),
            (r#"{"detail": "not so"}"#, "not so"),
            (r#"{"detail": [{"loc": ["body", "x"], "msg": "not so"}]}"#, "not so"),
            (r#"[{"error": {"message": "not so"}}]"#, "not so"),
            ("<h1>not so</h1>", "<h1>not so</h1>"),
            (r#"{"error": {"message": "wrong", "metadata": {"raw": "not so"}}}"#, "wrong: not so"),
            ("", ""),
        ] {
            assert_eq!(Complaint::read(StatusCode::BAD_REQUEST, body.as_bytes()).summary(), told);
        }
    }

    #[test]
    fn of_a_long_complaint_all_is_read_and_the_beginning_told() {
        let words = format!("{} Unrecognized request argument supplied: seed", "bread ".repeat(50));
        assert_eq!(quirk(400, &says(&words)), Some(Quirk::Without("seed")));
        for body in [says(&words).to_string(), words] {
            let complaint = Complaint::read(StatusCode::BAD_REQUEST, body.as_bytes());
            for told in [complaint.summary(), complaint.midway_error().to_string()] {
                assert!(told.ends_with('…') && told.matches("bread").count() < 35, "{told}");
            }
        }
    }
}
