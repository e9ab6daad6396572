//! The keys of profiles before 0.2, read for one more version.

use super::ProfileError;

/// What keys of questions are called now.
const OF_QUESTIONS: [(&str, &str); 2] = [("even", "prior"), ("alternatives", "top_logprobs")];

/// Changes to a profile of `method`, with the keys of today.
pub(super) fn renamed(mut changes: toml::Table, method: &str) -> Result<toml::Table, ProfileError> {
    let method = changes.get("method").and_then(toml::Value::as_str).unwrap_or(method).to_owned();
    match changes.remove("refusals") {
        Some(toml::Value::String(kind)) if kind == "safe" => {
            let why =
                "refusals = \"safe\" is gone: how an answer begins is no verdict; `hardened` asks whether it helps";
            return Err(ProfileError::Invalid(why.into()));
        }
        _ => {}
    }
    if method == "hardened" {
        if let Some(toml::Value::Table(detect)) = changes.get_mut("detect")
            && let Some(threshold) = detect.remove("threshold")
        {
            changes.entry("threshold").or_insert(threshold);
        }
        for (old, new) in [("look", "request_check"), ("check", "reply_check"), ("detect", "reply_check")] {
            move_key(&mut changes, old, new);
        }
    }
    for question in ["detect", "request_check", "reply_check", "help_check"] {
        if let Some(toml::Value::Table(question)) = changes.get_mut(question) {
            for (old, new) in OF_QUESTIONS {
                move_key(question, old, new);
            }
        }
    }
    Ok(changes)
}

/// `old` becomes `new`; where both are there, what `new` has already stays.
fn move_key(table: &mut toml::Table, old: &str, new: &str) {
    let Some(value) = table.remove(old) else { return };
    match (table.get_mut(new), value) {
        (Some(toml::Value::Table(there)), toml::Value::Table(more)) => {
            for (key, value) in more {
                there.entry(key).or_insert(value);
            }
        }
        (Some(_), _) => {}
        (None, value) => {
            table.insert(new.to_owned(), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::Profile;

    #[test]
    fn the_keys_of_before_are_read() {
        let old = "extends = \"hardened\"\n[look]\nthreshold = 0.7\nalternatives = 0\nimage = \"kept\"\n[detect]\nthreshold = 0.4\neven = 0.3";
        let new = "extends = \"hardened\"\nthreshold = 0.4\n[request_check]\nthreshold = 0.7\ntop_logprobs = 0\nimage = \"include\"\n\
                   [reply_check]\nprior = 0.3";
        assert_eq!(Profile::from_toml(old).unwrap(), Profile::from_toml(new).unwrap());
        let hardened = Profile::named("hardened").unwrap();
        assert_eq!(hardened.with("detect.threshold", "0.3").unwrap(), hardened.with("threshold", "0.3").unwrap());
        let paper = Profile::paper();
        assert_eq!(paper.with("detect.even", "0.3").unwrap(), paper.with("detect.prior", "0.3").unwrap());
        let error = Profile::from_toml("extends = \"hardened\"\nrefusals = \"safe\"").unwrap_err();
        assert!(error.to_string().contains("is gone"), "{error}");
    }
}
