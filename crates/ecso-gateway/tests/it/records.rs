//! What is written down, whatever becomes of a request.

use std::{path::Path, sync::Arc};

use ecso_gateway::{
    Settings,
    settings::{AuditSettings, Mode},
};
use serde_json::{Value, json};

use crate::world::{LEAK, World, question, said, streamed};

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test]
async fn a_verdict_is_recorded_when_it_falls() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let audit = AuditSettings { path: path.clone(), ..AuditSettings::default() };
    let settings = Settings { audit, ..Settings::default() };
    let harmful = |sent: &Value| {
        let message = json!({"role": "assistant", "content": LEAK});
        if sent["stream"] == true {
            return streamed(&[json!({"choices": [{"delta": message, "finish_reason": "stop"}]}).to_string()]);
        }
        said(&message, &Value::Null)
    };
    let world = World::new(settings.clone(), Arc::new(harmful)).await;
    // A later step fails, plain and streamed, and where an answer is brought along.
    let mut body = question();
    body["model"] = "caption-500".into();
    for stream in [false, true] {
        body["stream"] = stream.into();
        assert!(!world.chat(&body).await.leaks());
    }
    let guard = json!({"model": "caption-500", "messages": question()["messages"], "answer": LEAK});
    let got = world.send("POST", "/v1/guard", &[], guard.to_string()).await;
    assert!(got.status.is_server_error(), "{}", got.body);
    let found = lines(&path);
    assert_eq!(found.len(), 3, "{found:?}");
    for line in &found {
        assert_eq!((&line["verdict"], &line["failure"]), (&json!("unsafe"), &json!("unfinished")), "{line}");
        assert!(!line.to_string().contains(LEAK));
    }
    #[cfg(unix)]
    {
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
    }

    // What can't be read is observed all the same.
    let observed = World::new(Settings { mode: Mode::Observe, ..settings }, Arc::new(harmful)).await;
    let mut odd = question();
    odd["guided_choice"] = json!(["a"]);
    assert!(observed.chat(&odd).await.status.is_success());
    for _ in 0..100 {
        if lines(&path).len() > 3 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let last = lines(&path).pop().unwrap();
    assert_eq!(
        (&last["verdict"], &last["failure"], &last["mode"]),
        (&json!("unchecked"), &json!("unknown_field"), &json!("observe"))
    );
}
