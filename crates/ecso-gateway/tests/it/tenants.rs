//! Models and clients with settings of their own.

use std::{collections::BTreeMap, sync::Arc};

use ecso::{Profile, profile::Scope};
use ecso_gateway::{
    Profiles, Settings,
    settings::{Key, Mode},
};
use serde_json::{Value, json};

use crate::support::{Harness, LEAK, question, said};

#[tokio::test]
async fn models_and_clients_have_their_own_profile_and_mode() {
    let mut everything = Profile::paper();
    everything.scope = Scope::All;
    let (secret, own) = Key::generate();
    let (other, observed) = Key::generate();
    let settings = Settings {
        profiles: BTreeMap::from([("strict".into(), "everything".into())]),
        keys: BTreeMap::from([
            ("app".into(), own),
            ("lab".into(), Key { profile: Some("everything".into()), ..observed }),
        ]),
        modes: BTreeMap::from([("free".into(), Mode::Off)]),
        ..Settings::default()
    };
    let profiles = Profiles {
        default: Profile::paper(),
        named: BTreeMap::from([("everything".into(), everything)]),
        fitted: None,
    };
    let respond = Arc::new(|_: &Value| {
        said(&json!({"role": "assistant", "content": "Bread."}), &Value::Null)
    });
    let world = Harness::with(settings.clone(), profiles, respond).await;
    for (key, model, is_judged) in [
        (&secret, "m", false),
        (&secret, "strict", true),
        (&other, "m", true),
        (&other, "strict", true),
        (&other, "free", false),
    ] {
        let body =
            json!({"model": model, "messages": [{"role": "user", "content": "What is a list?"}]})
                .to_string();
        let key = format!("Bearer {key}");
        let got =
            world.send("POST", "/v1/chat/completions", &[("authorization", &key)], body).await;
        assert!(got.status.is_success(), "{}", got.body);
        assert_eq!(got.headers.contains_key("x-ecso-verdict"), is_judged, "{model}");
    }
    let unknown = Harness::gateway(settings, Profile::paper(), "http://127.0.0.1:9/v1");
    assert!(unknown.is_err_and(|error| error.to_string().contains("everything")));
}

#[tokio::test]
async fn a_looser_mode_needs_a_model_that_nothing_else_names() {
    let settings =
        Settings { modes: BTreeMap::from([("research".into(), Mode::Off)]), ..Settings::default() };
    let respond =
        Arc::new(|_: &Value| said(&json!({"role": "assistant", "content": LEAK}), &Value::Null));
    let world = Harness::new(settings, respond).await;
    let rest = format!("\"messages\": {}", question()["messages"]);
    let chat = "/v1/chat/completions";
    for (path, model, is_guarded) in [
        (chat, r#""model": "research""#, false),
        (chat, r#""model": "m""#, true),
        (chat, r#""model": "research", "Model": "m""#, true),
        (chat, r#""MODEL": "m", "model": "research""#, true),
        (chat, r#""model": "research", "mod\u0045l": "m""#, true),
        (chat, r#""model": "research", "model": "m""#, true),
        (chat, r#""model": "research", "models": ["m"]"#, true),
        (chat, r#""model": "research", "fallbacks": ["m"]"#, true),
        (chat, r#""model": "research", "extra_body": {"model": "m"}"#, true),
        (chat, r#""model": ["research"]"#, true),
        ("/v1/chat/completions?a=b", r#""model": "research""#, false),
        ("/v1/chat/completions?model=m", r#""model": "research""#, true),
        ("/v1/messages", r#""model": "research", "max_tokens": 9"#, false),
        ("/v1/messages", r#""model": "research", "Model": "m", "max_tokens": 9"#, true),
        ("/v1/messages?beta=true", r#""model": "research", "max_tokens": 9"#, false),
        ("/v1/messages?model=m", r#""model": "research", "max_tokens": 9"#, true),
        ("/v1/messages?a=b&M%6fdel=m", r#""model": "research", "max_tokens": 9"#, true),
        ("/v1/messages?a=b;model=m", r#""model": "research", "max_tokens": 9"#, true),
    ] {
        let got = world.send("POST", path, &[], format!("{{{model}, {rest}}}")).await;
        assert_eq!(got.leaks(), !is_guarded, "{path} {model}: {}", got.body);
    }
}
