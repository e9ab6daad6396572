//! The known fields of chat requests: those of OpenAI's API, and those that servers and gateways
//! add, as far as a number, a boolean or a fixed word can do no harm.

use crate::forms::Form;

/// Fields that control how an answer is generated. They also apply to the safe answer.
pub(crate) const SAMPLING: &[(&str, Form)] = &[
    ("temperature", Form::Scalar),
    ("top_p", Form::Scalar),
    ("top_k", Form::Scalar),
    ("top_a", Form::Scalar),
    ("min_p", Form::Scalar),
    ("typical_p", Form::Scalar),
    ("seed", Form::Scalar),
    ("max_tokens", Form::Scalar),
    ("max_completion_tokens", Form::Scalar),
    ("min_tokens", Form::Scalar),
    ("n_predict", Form::Scalar),
    ("frequency_penalty", Form::Scalar),
    ("presence_penalty", Form::Scalar),
    ("repetition_penalty", Form::Scalar),
    ("repeat_penalty", Form::Scalar),
    ("repeat_last_n", Form::Scalar),
    ("length_penalty", Form::Scalar),
    ("no_repeat_ngram_size", Form::Scalar),
    ("mirostat", Form::Scalar),
    ("mirostat_tau", Form::Scalar),
    ("mirostat_eta", Form::Scalar),
    ("dynatemp_range", Form::Scalar),
    ("dynatemp_exponent", Form::Scalar),
    ("xtc_probability", Form::Scalar),
    ("xtc_threshold", Form::Scalar),
    ("dry_multiplier", Form::Scalar),
    ("dry_base", Form::Scalar),
    ("dry_allowed_length", Form::Scalar),
    ("dry_penalty_last_n", Form::Scalar),
    ("samplers", Form::AnyOf(&[Form::Raw, Form::List(&Form::Raw)])),
    ("backend_sampling", Form::Scalar),
    ("top_n_sigma", Form::Scalar),
    ("random_seed", Form::Scalar),
    ("safe_prompt", Form::Scalar),
    ("detokenize", Form::Scalar),
    ("dry_sequence_breakers", Form::AnyOf(&[Form::Raw, Form::List(&Form::Raw)])),
    ("bad_words", Form::AnyOf(&[Form::Raw, Form::List(&Form::Raw)])),
    ("allowed_token_ids", Form::Scalars),
    ("n_keep", Form::Scalar),
    ("id_slot", Form::Scalar),
    ("separate_reasoning", Form::Scalar),
    ("stream_reasoning", Form::Scalar),
    ("tool_stream", Form::Scalar),
    ("vl_high_resolution_images", Form::Scalar),
    ("thinking_token_budget", Form::Scalar),
    ("typ_p", Form::Scalar),
    ("tfs_z", Form::Scalar),
    ("num_batch", Form::Scalar),
    ("num_gpu", Form::Scalar),
    ("num_keep", Form::Scalar),
    ("num_thread", Form::Scalar),
    ("use_mmap", Form::Scalar),
    ("use_mlock", Form::Scalar),
    ("options", Form::Scalars),
    ("keep_alive", Form::Label),
    ("logit_bias", Form::Scalars),
    ("stop_token_ids", Form::Scalars),
    ("bad_words_ids", Form::Scalars),
    ("ignore_eos", Form::Scalar),
    ("skip_special_tokens", Form::Scalar),
    ("spaces_between_special_tokens", Form::Scalar),
    ("include_stop_str_in_output", Form::Scalar),
    ("use_beam_search", Form::Scalar),
    ("best_of", Form::Scalar),
    ("do_sample", Form::Scalar),
    ("stop", Form::AnyOf(&[Form::Raw, Form::List(&Form::Raw)])),
    ("response_format", Form::Any),
    ("reasoning_effort", EFFORT),
    ("verbosity", Form::OneOf(&["low", "medium", "high"])),
    (
        "reasoning_format",
        Form::OneOf(&["none", "auto", "deepseek", "deepseek-legacy", "parsed", "raw", "hidden"]),
    ),
    (
        "reasoning",
        Form::Object(&[
            ("effort", EFFORT),
            ("summary", Form::OneOf(&["auto", "concise", "detailed"])),
            ("max_tokens", Form::Scalar),
            ("exclude", Form::Scalar),
            ("enabled", Form::Scalar),
        ]),
    ),
    (
        "thinking",
        Form::Object(&[
            ("type", Form::OneOf(&["enabled", "disabled", "adaptive", "auto"])),
            ("budget_tokens", Form::Scalar),
            ("clear_thinking", Form::Scalar),
        ]),
    ),
    (
        "thinking_config",
        Form::Object(&[
            ("thinking_level", EFFORT),
            ("thinking_budget", Form::Scalar),
            ("include_thoughts", Form::Scalar),
        ]),
    ),
    ("include_reasoning", Form::Scalar),
    ("reasoning_control", Form::Scalar),
    ("thinking_budget_tokens", Form::Scalar),
    ("enable_thinking", Form::Scalar),
    ("thinking_budget", Form::Scalar),
    ("think", Form::AnyOf(&[Form::Scalar, EFFORT])),
    (
        "service_tier",
        Form::OneOf(&[
            "auto",
            "default",
            "flex",
            "scale",
            "priority",
            "standard_only",
            "on_demand",
        ]),
    ),
    ("priority", Form::Scalar),
    ("cache_prompt", Form::Scalar),
    ("cache_salt", Form::Label),
    ("prompt_cache_key", Form::Label),
    ("prompt_cache_retention", Form::OneOf(&["in-memory", "in_memory", "24h"])),
    ("user", Form::AnyOf(&[Form::Label, Form::Labels])),
    ("session_id", Form::Label),
    ("safety_identifier", Form::Label),
    ("metadata", Form::Labels),
    ("chat_template_kwargs", Form::Object(TEMPLATE_SWITCHES)),
    ("mm_processor_kwargs", Form::Object(IMAGE_SWITCHES)),
    ("structured_outputs", Form::Scalar),
    ("format", Form::OneOf(&["json"])),
    ("usage", Form::Object(&[("include", Form::Scalar)])),
];

/// Fields that would steer a guarded answer, or send the request elsewhere. They are only passed on
/// for chats that are not guarded, unless the operator lists them.
pub(crate) const STEERING: &[&str] = &[
    // The model would not see all that was judged.
    "truncate_prompt_tokens",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_decoding_backend",
    "structured_outputs",
    "structural_tag",
    "json_schema",
    "grammar",
    "format",
    "regex",
    "ebnf",
    "provider",
    "models",
    "route",
    "transforms",
    "web_search_options",
    "search_settings",
    "thinking_config",
];

/// Fields of requests for one plain text, whose streams may be windowed. With any other field, a
/// stream is held.
pub(crate) const PLAIN_TEXT_FIELDS: &[&str] = &[
    "model",
    "messages",
    "stream",
    "stream_options",
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "repeat_penalty",
    "stop",
    "verbosity",
    "reasoning_effort",
    "reasoning",
    "thinking",
    "enable_thinking",
    "thinking_budget",
    "include_reasoning",
    "reasoning_format",
    "chat_template_kwargs",
    "mm_processor_kwargs",
    "modalities",
    "service_tier",
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "cache_prompt",
    "num_ctx",
    "keep_alive",
];

/// Known keys of `chat_template_kwargs`. The guard's own calls take them over, so none of them may
/// shorten a prompt, or say anything in it.
const TEMPLATE_SWITCHES: &[(&str, Form)] = &[
    ("enable_thinking", Form::Scalar),
    ("thinking", Form::Scalar),
    ("thinking_budget", Form::Scalar),
    ("clear_thinking", Form::Scalar),
    ("preserve_thinking", Form::Scalar),
    ("reasoning_effort", EFFORT),
    ("add_vision_id", Form::Scalar),
];

/// Known keys of `mm_processor_kwargs`. The guard's own calls take them over, so that its model sees
/// the images as the guarded one does.
const IMAGE_SWITCHES: &[(&str, Form)] = &[
    ("min_pixels", Form::Scalar),
    ("max_pixels", Form::Scalar),
    ("total_pixels", Form::Scalar),
    (
        "size",
        Form::Object(&[
            ("shortest_edge", Form::Scalar),
            ("longest_edge", Form::Scalar),
            ("height", Form::Scalar),
            ("width", Form::Scalar),
        ]),
    ),
    ("min_dynamic_patch", Form::Scalar),
    ("max_dynamic_patch", Form::Scalar),
    ("max_slice_nums", Form::Scalar),
    ("num_crops", Form::Scalar),
    ("do_pan_and_scan", Form::Scalar),
    ("fps", Form::Scalar),
];

/// The fields that the guard's own calls take over from a request, with their known keys.
pub(crate) const SHARED: &[(&str, &[(&str, Form)])] =
    &[("chat_template_kwargs", TEMPLATE_SWITCHES), ("mm_processor_kwargs", IMAGE_SWITCHES)];

/// Fields about this one request.
pub(crate) const REQUEST: &[(&str, Form)] = &[
    ("model", Form::Label),
    ("messages", Form::Any),
    ("stream", Form::Scalar),
    (
        "stream_options",
        Form::Object(&[
            ("include_usage", Form::Scalar),
            ("include_obfuscation", Form::Scalar),
            ("continuous_usage_stats", Form::Scalar),
        ]),
    ),
    ("n", Form::Scalar),
    ("logprobs", Form::Scalar),
    ("top_logprobs", Form::Scalar),
    ("tools", Form::List(&TOOL)),
    ("tool_choice", Form::AnyOf(&[Form::OneOf(&["auto", "none", "required", "any"]), Form::Any])),
    ("parallel_tool_calls", Form::Scalar),
    ("functions", Form::Any),
    ("function_call", Form::AnyOf(&[Form::OneOf(&["auto", "none"]), Form::Any])),
    ("documents", Form::Any),
    ("prediction", Form::Any),
    ("modalities", Form::List(&Form::OneOf(&["text"]))),
    ("audio", Form::OneOf(&[])),
    ("continue_final_message", Form::Scalar),
    ("add_generation_prompt", Form::Scalar),
    ("add_special_tokens", Form::Scalar),
    ("num_ctx", Form::Scalar),
    ("request_id", Form::Label),
    ("rid", Form::Label),
    ("timings_per_token", Form::Scalar),
    ("return_progress", Form::Scalar),
    ("post_sampling_probs", Form::Scalar),
    // These would store an answer where it is not judged, or return it in another form.
    ("store", Form::Dropped),
    ("echo", Form::Dropped),
    ("n_probs", Form::Dropped),
    ("prompt_logprobs", Form::Dropped),
    ("return_token_ids", Form::Dropped),
    ("return_tokens_as_token_ids", Form::Dropped),
    ("return_tokens", Form::Dropped),
    ("verbose", Form::Dropped),
];

const EFFORT: Form =
    Form::OneOf(&["none", "minimal", "low", "medium", "high", "xhigh", "max", "default"]);
const CACHE_CONTROL: Form = Form::Object(&[
    ("type", Form::OneOf(&["ephemeral", "persistent"])),
    ("ttl", Form::OneOf(&["5m", "1h", "24h"])),
]);

const TOOL: Form = Form::Object(&[
    ("type", Form::OneOf(&["function", "custom"])),
    ("function", Form::Any),
    ("custom", Form::Any),
    ("strict", Form::Scalar),
    ("cache_control", CACHE_CONTROL),
]);

/// Encrypted or signed thoughts, next to the call or message that they belong to.
pub(crate) const SIGNATURES: Form = Form::Object(&[
    ("thought_signature", Form::Opaque),
    ("thought_signatures", Form::List(&Form::Opaque)),
    ("signature", Form::Opaque),
    ("google", Form::Object(&[("thought_signature", Form::Opaque)])),
    ("refusal", Form::Text),
    ("reasoning_content", Form::Text),
]);

/// A function that is called.
const FUNCTION: Form = Form::Object(&[
    ("name", Form::Text),
    ("arguments", Form::AnyOf(&[Form::Text, Form::Any])),
    ("parsed_arguments", Form::Any),
    ("description", Form::Text),
]);

/// A tool call, in a request or an answer.
pub(crate) const TOOL_CALL: Form = Form::Object(&[
    ("id", Form::Name),
    ("index", Form::Scalar),
    ("type", Form::OneOf(&["function", "custom"])),
    ("function", FUNCTION),
    ("custom", Form::Object(&[("name", Form::Text), ("input", Form::Text)])),
    ("thought_signature", Form::Opaque),
    ("extra_content", SIGNATURES),
    ("provider_specific_fields", SIGNATURES),
]);

/// The older form of a tool call.
pub(crate) const FUNCTION_CALL: Form = FUNCTION;

/// A block of thinking, readable or encrypted.
pub(crate) const THINKING_BLOCK: Form = Form::Object(&[
    (
        "type",
        Form::OneOf(&[
            "thinking",
            "redacted_thinking",
            "reasoning",
            "reasoning.text",
            "reasoning.summary",
            "reasoning.encrypted",
            "summary_text",
            "text",
        ]),
    ),
    ("text", Form::Text),
    ("thinking", Form::Text),
    ("summary", Form::AnyOf(&[Form::Text, Form::Any])),
    ("data", Form::Opaque),
    ("signature", Form::Opaque),
    ("encrypted_content", Form::Opaque),
    ("id", Form::Name),
    (
        "format",
        Form::OneOf(&[
            "unknown",
            "anthropic-claude-v1",
            "openai-responses-v1",
            "google-gemini-v1",
            "xai-responses-v1",
        ]),
    ),
    ("index", Form::Scalar),
    ("cache_control", CACHE_CONTROL),
]);

pub(crate) const MESSAGE: &[(&str, Form)] = &[
    ("role", Form::OneOf(&["system", "developer", "user", "assistant", "tool", "function"])),
    ("content", Form::Any),
    ("name", Form::Text),
    ("tool_calls", Form::List(&TOOL_CALL)),
    ("tool_call_id", Form::Name),
    ("function_call", FUNCTION_CALL),
    ("refusal", Form::Text),
    ("status", Form::OneOf(&["in_progress", "completed", "incomplete", "success", "error"])),
    ("is_error", Form::Scalar),
    ("tool_name", Form::Text),
    ("thinking", Form::Text),
    ("parsed", Form::Any),
    ("reasoning", Form::Text),
    ("reasoning_content", Form::Text),
    ("reasoning_details", Form::List(&THINKING_BLOCK)),
    ("thinking_blocks", Form::List(&THINKING_BLOCK)),
    ("annotations", Form::Any),
    ("cache_control", CACHE_CONTROL),
    ("prefix", Form::Scalar),
    ("partial", Form::Scalar),
    ("id", Form::Name),
    ("thought_signature", Form::Opaque),
    ("signature", Form::Opaque),
    ("encrypted_content", Form::Opaque),
    ("extra_content", SIGNATURES),
    ("provider_specific_fields", SIGNATURES),
    // An earlier audio answer, which the upstream stores and the guard has never seen. It may be
    // null.
    ("audio", Form::OneOf(&[])),
];

pub(crate) const TEXT_PART: &[(&str, Form)] = &[
    ("type", Form::OneOf(&["text", "input_text", "output_text"])),
    ("text", Form::Text),
    ("cache_control", CACHE_CONTROL),
    ("annotations", Form::Any),
    ("id", Form::Dropped),
    ("uuid", Form::Dropped),
    ("logprobs", Form::Dropped),
];

/// A recording. Nothing in it can be taken for an image.
pub(crate) const AUDIO_PART: &[(&str, Form)] = &[
    ("type", Form::OneOf(&["input_audio"])),
    (
        "input_audio",
        Form::Object(&[
            ("data", Form::Opaque),
            ("format", Form::OneOf(&["wav", "mp3", "flac", "ogg", "opus", "pcm16", "m4a"])),
        ]),
    ),
    ("cache_control", CACHE_CONTROL),
];

pub(crate) const REFUSAL_PART: &[(&str, Form)] =
    &[("type", Form::OneOf(&["refusal"])), ("refusal", Form::Text)];

pub(crate) const THINKING_PART: &[(&str, Form)] = &[
    ("type", Form::OneOf(&["thinking", "redacted_thinking", "reasoning"])),
    ("thinking", Form::AnyOf(&[Form::Text, Form::List(&Form::Object(TEXT_PART))])),
    ("text", Form::Text),
    ("data", Form::Opaque),
    ("signature", Form::Opaque),
    ("closed", Form::Scalar),
    ("cache_control", CACHE_CONTROL),
];

/// How the model is to look at an image.
const DETAIL: Form = Form::OneOf(&["low", "high", "auto", "original"]);

pub(crate) const IMAGE_PART: &[(&str, Form)] = &[
    ("type", Form::OneOf(&["image_url", "input_image"])),
    (
        "image_url",
        Form::AnyOf(&[
            Form::Raw,
            Form::Object(&[
                ("url", Form::Raw),
                ("detail", DETAIL),
                (
                    "format",
                    Form::OneOf(&[
                        "png",
                        "jpeg",
                        "jpg",
                        "webp",
                        "gif",
                        "image/png",
                        "image/jpeg",
                        "image/webp",
                        "image/gif",
                    ]),
                ),
                ("min_pixels", Form::Scalar),
                ("max_pixels", Form::Scalar),
                ("total_pixels", Form::Scalar),
                ("resized_height", Form::Scalar),
                ("resized_width", Form::Scalar),
                ("max_dynamic_patch", Form::Scalar),
                ("min_dynamic_patch", Form::Scalar),
                ("uuid", Form::Dropped),
            ]),
        ]),
    ),
    ("detail", DETAIL),
    ("min_pixels", Form::Scalar),
    ("max_pixels", Form::Scalar),
    ("total_pixels", Form::Scalar),
    ("resized_height", Form::Scalar),
    ("resized_width", Form::Scalar),
    ("max_dynamic_patch", Form::Scalar),
    ("min_dynamic_patch", Form::Scalar),
    ("max_slice_nums", Form::Scalar),
    ("cache_control", CACHE_CONTROL),
    ("id", Form::Dropped),
    ("modalities", Form::OneOf(&["image", "multi-images"])),
    // Servers use it as the key of their image cache, which may hold another image.
    ("uuid", Form::Dropped),
];

/// Whether a text is the name of a known field.
pub(crate) fn is_request_field(name: &str) -> bool {
    name == "messages" || SAMPLING.iter().chain(REQUEST).any(|(known, _)| *known == name)
}
