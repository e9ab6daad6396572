//! The fields of chat requests that are known: those of OpenAI's API, and what servers and gateways
//! have beside them, as far as a number, a switch or a fixed word can do no harm.

use crate::forms::Form;

/// Fields about the way an answer is drawn. The safe answer is drawn the same way.
pub(crate) const SAMPLING: &[(&str, Form)] = &[
    ("temperature", Form::Plain),
    ("top_p", Form::Plain),
    ("top_k", Form::Plain),
    ("top_a", Form::Plain),
    ("min_p", Form::Plain),
    ("typical_p", Form::Plain),
    ("seed", Form::Plain),
    ("max_tokens", Form::Plain),
    ("max_completion_tokens", Form::Plain),
    ("min_tokens", Form::Plain),
    ("n_predict", Form::Plain),
    ("frequency_penalty", Form::Plain),
    ("presence_penalty", Form::Plain),
    ("repetition_penalty", Form::Plain),
    ("repeat_penalty", Form::Plain),
    ("repeat_last_n", Form::Plain),
    ("length_penalty", Form::Plain),
    ("no_repeat_ngram_size", Form::Plain),
    ("mirostat", Form::Plain),
    ("mirostat_tau", Form::Plain),
    ("mirostat_eta", Form::Plain),
    ("dynatemp_range", Form::Plain),
    ("dynatemp_exponent", Form::Plain),
    ("xtc_probability", Form::Plain),
    ("xtc_threshold", Form::Plain),
    ("dry_multiplier", Form::Plain),
    ("dry_base", Form::Plain),
    ("dry_allowed_length", Form::Plain),
    ("dry_penalty_last_n", Form::Plain),
    ("samplers", Form::Either(&[Form::Raw, Form::List(&Form::Raw)])),
    ("backend_sampling", Form::Plain),
    ("top_n_sigma", Form::Plain),
    ("random_seed", Form::Plain),
    ("safe_prompt", Form::Plain),
    ("detokenize", Form::Plain),
    ("dry_sequence_breakers", Form::Either(&[Form::Raw, Form::List(&Form::Raw)])),
    ("bad_words", Form::Either(&[Form::Raw, Form::List(&Form::Raw)])),
    ("allowed_token_ids", Form::Plains),
    ("n_keep", Form::Plain),
    ("id_slot", Form::Plain),
    ("separate_reasoning", Form::Plain),
    ("stream_reasoning", Form::Plain),
    ("tool_stream", Form::Plain),
    ("vl_high_resolution_images", Form::Plain),
    ("thinking_token_budget", Form::Plain),
    ("typ_p", Form::Plain),
    ("tfs_z", Form::Plain),
    ("num_batch", Form::Plain),
    ("num_gpu", Form::Plain),
    ("num_keep", Form::Plain),
    ("num_thread", Form::Plain),
    ("use_mmap", Form::Plain),
    ("use_mlock", Form::Plain),
    ("options", Form::Plains),
    ("keep_alive", Form::Label),
    ("logit_bias", Form::Plains),
    ("stop_token_ids", Form::Plains),
    ("bad_words_ids", Form::Plains),
    ("ignore_eos", Form::Plain),
    ("skip_special_tokens", Form::Plain),
    ("spaces_between_special_tokens", Form::Plain),
    ("include_stop_str_in_output", Form::Plain),
    ("use_beam_search", Form::Plain),
    ("best_of", Form::Plain),
    ("do_sample", Form::Plain),
    ("stop", Form::Either(&[Form::Raw, Form::List(&Form::Raw)])),
    ("response_format", Form::Any),
    ("reasoning_effort", EFFORT),
    ("verbosity", Form::Word(&["low", "medium", "high"])),
    (
        "reasoning_format",
        Form::Word(&["none", "auto", "deepseek", "deepseek-legacy", "parsed", "raw", "hidden"]),
    ),
    (
        "reasoning",
        Form::Fields(&[
            ("effort", EFFORT),
            ("summary", Form::Word(&["auto", "concise", "detailed"])),
            ("max_tokens", Form::Plain),
            ("exclude", Form::Plain),
            ("enabled", Form::Plain),
        ]),
    ),
    (
        "thinking",
        Form::Fields(&[
            ("type", Form::Word(&["enabled", "disabled", "adaptive", "auto"])),
            ("budget_tokens", Form::Plain),
            ("clear_thinking", Form::Plain),
        ]),
    ),
    (
        "thinking_config",
        Form::Fields(&[
            ("thinking_level", EFFORT),
            ("thinking_budget", Form::Plain),
            ("include_thoughts", Form::Plain),
        ]),
    ),
    ("include_reasoning", Form::Plain),
    ("reasoning_control", Form::Plain),
    ("thinking_budget_tokens", Form::Plain),
    ("enable_thinking", Form::Plain),
    ("thinking_budget", Form::Plain),
    ("think", Form::Either(&[Form::Plain, EFFORT])),
    (
        "service_tier",
        Form::Word(&["auto", "default", "flex", "scale", "priority", "standard_only", "on_demand"]),
    ),
    ("priority", Form::Plain),
    ("cache_prompt", Form::Plain),
    ("cache_salt", Form::Label),
    ("prompt_cache_key", Form::Label),
    ("prompt_cache_retention", Form::Word(&["in-memory", "in_memory", "24h"])),
    ("user", Form::Either(&[Form::Label, Form::Labels])),
    ("session_id", Form::Label),
    ("safety_identifier", Form::Label),
    ("metadata", Form::Labels),
    ("chat_template_kwargs", Form::Either(&[Form::Plains, Form::Any])),
    ("mm_processor_kwargs", Form::Plains),
    ("structured_outputs", Form::Plain),
    ("format", Form::Word(&["json"])),
    ("usage", Form::Fields(&[("include", Form::Plain)])),
];

/// Fields that would steer a guarded answer, or send the request elsewhere: known where a chat is
/// not guarded, where they pass; an operator may list them for guarded ones.
pub(crate) const STEERING: &[&str] = &[
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

/// Fields of requests for one plain text, with which a stream may be windowed. With any other it is
/// held.
pub(crate) const PLAIN: &[&str] = &[
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

/// Keys of `chat_template_kwargs` that would take the place of what the server itself gives its
/// template.
pub(crate) const OF_THE_TEMPLATE: &[&str] = &[
    "chat_template",
    "conversation",
    "messages",
    "tools",
    "documents",
    "tokenize",
    "return_dict",
    "add_generation_prompt",
    "continue_final_message",
];

/// Fields about this one request.
pub(crate) const ONCE: &[(&str, Form)] = &[
    ("model", Form::Label),
    ("messages", Form::Any),
    ("stream", Form::Plain),
    (
        "stream_options",
        Form::Fields(&[
            ("include_usage", Form::Plain),
            ("include_obfuscation", Form::Plain),
            ("continuous_usage_stats", Form::Plain),
        ]),
    ),
    ("n", Form::Plain),
    ("logprobs", Form::Plain),
    ("top_logprobs", Form::Plain),
    ("tools", Form::List(&TOOL)),
    ("tool_choice", Form::Either(&[Form::Word(&["auto", "none", "required", "any"]), Form::Any])),
    ("parallel_tool_calls", Form::Plain),
    ("functions", Form::Any),
    ("function_call", Form::Either(&[Form::Word(&["auto", "none"]), Form::Any])),
    ("documents", Form::Any),
    ("prediction", Form::Any),
    ("modalities", Form::List(&Form::Word(&["text"]))),
    ("audio", Form::Word(&[])),
    ("continue_final_message", Form::Plain),
    ("add_generation_prompt", Form::Plain),
    ("add_special_tokens", Form::Plain),
    ("truncate_prompt_tokens", Form::Plain),
    ("num_ctx", Form::Plain),
    ("request_id", Form::Label),
    ("rid", Form::Label),
    ("timings_per_token", Form::Plain),
    ("return_progress", Form::Plain),
    ("post_sampling_probs", Form::Plain),
    // What would keep an answer where nobody judges it, or tell of it by another way.
    ("store", Form::Gone),
    ("echo", Form::Gone),
    ("n_probs", Form::Gone),
    ("prompt_logprobs", Form::Gone),
    ("return_token_ids", Form::Gone),
    ("return_tokens_as_token_ids", Form::Gone),
    ("return_tokens", Form::Gone),
    ("verbose", Form::Gone),
];

const EFFORT: Form =
    Form::Word(&["none", "minimal", "low", "medium", "high", "xhigh", "max", "default"]);
const CACHE: Form = Form::Fields(&[
    ("type", Form::Word(&["ephemeral", "persistent"])),
    ("ttl", Form::Word(&["5m", "1h", "24h"])),
]);

const TOOL: Form = Form::Fields(&[
    ("type", Form::Word(&["function", "custom"])),
    ("function", Form::Any),
    ("custom", Form::Any),
    ("strict", Form::Plain),
    ("cache_control", CACHE),
]);

/// What only the maker of a thought can read, beside the call or message that it belongs to.
pub(crate) const SEALS: Form = Form::Fields(&[
    ("thought_signature", Form::Sealed),
    ("thought_signatures", Form::List(&Form::Sealed)),
    ("signature", Form::Sealed),
    ("google", Form::Fields(&[("thought_signature", Form::Sealed)])),
    ("refusal", Form::Text),
    ("reasoning_content", Form::Text),
]);

/// A called function.
const CALLED: Form = Form::Fields(&[
    ("name", Form::Text),
    ("arguments", Form::Either(&[Form::Text, Form::Any])),
    ("parsed_arguments", Form::Any),
    ("description", Form::Text),
]);

/// A tool call, of a request or an answer.
pub(crate) const CALL: Form = Form::Fields(&[
    ("id", Form::Name),
    ("index", Form::Plain),
    ("type", Form::Word(&["function", "custom"])),
    ("function", CALLED),
    ("custom", Form::Fields(&[("name", Form::Text), ("input", Form::Text)])),
    ("thought_signature", Form::Sealed),
    ("extra_content", SEALS),
    ("provider_specific_fields", SEALS),
]);

/// The old form of a tool call.
pub(crate) const FUNCTION_CALL: Form = CALLED;

/// A piece of thinking, open or sealed.
pub(crate) const BLOCK: Form = Form::Fields(&[
    (
        "type",
        Form::Word(&[
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
    ("summary", Form::Either(&[Form::Text, Form::Any])),
    ("data", Form::Sealed),
    ("signature", Form::Sealed),
    ("encrypted_content", Form::Sealed),
    ("id", Form::Name),
    (
        "format",
        Form::Word(&[
            "unknown",
            "anthropic-claude-v1",
            "openai-responses-v1",
            "google-gemini-v1",
            "xai-responses-v1",
        ]),
    ),
    ("index", Form::Plain),
    ("cache_control", CACHE),
]);

pub(crate) const MESSAGE: &[(&str, Form)] = &[
    ("role", Form::Word(&["system", "developer", "user", "assistant", "tool", "function"])),
    ("content", Form::Any),
    ("name", Form::Text),
    ("tool_calls", Form::List(&CALL)),
    ("tool_call_id", Form::Name),
    ("function_call", FUNCTION_CALL),
    ("refusal", Form::Text),
    ("status", Form::Word(&["in_progress", "completed", "incomplete", "success", "error"])),
    ("is_error", Form::Plain),
    ("tool_name", Form::Text),
    ("thinking", Form::Text),
    ("parsed", Form::Any),
    ("reasoning", Form::Text),
    ("reasoning_content", Form::Text),
    ("reasoning_details", Form::List(&BLOCK)),
    ("thinking_blocks", Form::List(&BLOCK)),
    ("annotations", Form::Any),
    ("cache_control", CACHE),
    ("prefix", Form::Plain),
    ("partial", Form::Plain),
    ("id", Form::Name),
    ("thought_signature", Form::Sealed),
    ("signature", Form::Sealed),
    ("encrypted_content", Form::Sealed),
    ("extra_content", SEALS),
    ("provider_specific_fields", SEALS),
    // An earlier spoken answer, which the upstream keeps and nobody here has heard; it may be null.
    ("audio", Form::Word(&[])),
];

pub(crate) const TEXT_PART: &[(&str, Form)] = &[
    ("type", Form::Word(&["text", "input_text", "output_text"])),
    ("text", Form::Text),
    ("cache_control", CACHE),
    ("annotations", Form::Any),
    ("id", Form::Gone),
    ("uuid", Form::Gone),
    ("logprobs", Form::Gone),
];

/// A recording, with nothing in it that a server could take for an image.
pub(crate) const AUDIO_PART: &[(&str, Form)] = &[
    ("type", Form::Word(&["input_audio"])),
    (
        "input_audio",
        Form::Fields(&[
            ("data", Form::Sealed),
            ("format", Form::Word(&["wav", "mp3", "flac", "ogg", "opus", "pcm16", "m4a"])),
        ]),
    ),
    ("cache_control", CACHE),
];

pub(crate) const REFUSAL_PART: &[(&str, Form)] =
    &[("type", Form::Word(&["refusal"])), ("refusal", Form::Text)];

pub(crate) const THOUGHT_PART: &[(&str, Form)] = &[
    ("type", Form::Word(&["thinking", "redacted_thinking", "reasoning"])),
    ("thinking", Form::Either(&[Form::Text, Form::List(&Form::Fields(TEXT_PART))])),
    ("text", Form::Text),
    ("data", Form::Sealed),
    ("signature", Form::Sealed),
    ("closed", Form::Plain),
    ("cache_control", CACHE),
];

/// How a model is to look at an image.
const DETAIL: Form = Form::Word(&["low", "high", "auto", "original"]);

pub(crate) const IMAGE_PART: &[(&str, Form)] = &[
    ("type", Form::Word(&["image_url", "input_image"])),
    (
        "image_url",
        Form::Either(&[
            Form::Raw,
            Form::Fields(&[
                ("url", Form::Raw),
                ("detail", DETAIL),
                (
                    "format",
                    Form::Word(&[
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
                ("min_pixels", Form::Plain),
                ("max_pixels", Form::Plain),
                ("total_pixels", Form::Plain),
                ("resized_height", Form::Plain),
                ("resized_width", Form::Plain),
                ("max_dynamic_patch", Form::Plain),
                ("min_dynamic_patch", Form::Plain),
                ("uuid", Form::Gone),
            ]),
        ]),
    ),
    ("detail", DETAIL),
    ("min_pixels", Form::Plain),
    ("max_pixels", Form::Plain),
    ("total_pixels", Form::Plain),
    ("resized_height", Form::Plain),
    ("resized_width", Form::Plain),
    ("max_dynamic_patch", Form::Plain),
    ("min_dynamic_patch", Form::Plain),
    ("max_slice_nums", Form::Plain),
    ("cache_control", CACHE),
    ("id", Form::Gone),
    ("modalities", Form::Word(&["image", "multi-images"])),
    // Servers take it for the image's name in their cache: another image may lie there.
    ("uuid", Form::Gone),
];

/// Whether a text is the name of a field that the guard knows.
pub(crate) fn is_known(name: &str) -> bool {
    name == "messages" || SAMPLING.iter().chain(ONCE).any(|(known, _)| *known == name)
}
