//! `ecso playground` and `ecso serve --playground`: the link and the browser. `scripts/playground`
//! tests the page itself.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    mock::{Model, Reply},
    serve::client,
};

/// A running program that prints links; killed when it is dropped.
struct Opened {
    process: Child,
    said: BufReader<std::process::ChildStderr>,
}

impl Opened {
    fn start(home: &Path, arguments: &[&str], path: &str) -> Self {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin("ecso"));
        command
            .args(arguments)
            .env_clear()
            .env("HOME", home)
            .env("PATH", path)
            .stderr(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let said = BufReader::new(process.stderr.take().unwrap());
        Self { process, said }
    }

    /// The next link that it prints.
    fn link(&mut self) -> String {
        let mut told = String::new();
        loop {
            let before = told.len();
            assert!(self.said.read_line(&mut told).unwrap() > 0, "no link: {told}");
            if let Some(at) =
                told[before..].find("http://").filter(|_| told[before..].contains("?token="))
            {
                return told[before + at..].trim().to_owned();
            }
        }
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The facts that the page gets with a link, whose token opens it.
async fn facts(link: &str) -> Value {
    let looked_at = client().get(link).send().await.unwrap();
    assert!(looked_at.status() == 200 && !looked_at.headers().contains_key("set-cookie"));
    let entered = client().post(link).send().await.unwrap();
    assert_eq!(entered.status(), 200);
    let cookie =
        entered.headers()["set-cookie"].to_str().unwrap().split(';').next().unwrap().to_owned();
    let url = reqwest::Url::parse(link).unwrap().join("/playground/facts").unwrap();
    client().get(url).header("cookie", cookie).send().await.unwrap().json().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_link_is_printed_once_one_is_used() {
    let (home, model) = (tempfile::tempdir().unwrap(), Model::start(Reply::usual).await);
    let mut opened =
        Opened::start(home.path(), &["playground", "--no-open", "--model", &model.url], "");
    let link = opened.link();
    assert!(link.starts_with("http://127.0.0.1:"), "{link}");
    let told = facts(&link).await;
    assert_eq!(
        (&told["model"], &told["trace"], &told["usual"]),
        (&"m".into(), &"full".into(), &"hardened".into())
    );
    assert_eq!(client().get(&link).send().await.unwrap().status(), 401);
    let next = opened.link();
    assert_ne!(link, next);
    assert_eq!(facts(&next).await["model"], "m");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_shows_what_its_settings_allow() {
    let (home, model) = (tempfile::tempdir().unwrap(), Model::start(Reply::usual).await);
    let serve = [
        "serve",
        "--playground",
        "--listen",
        "127.0.0.1:0",
        "--profile",
        "paper",
        "--upstream",
        &model.url,
    ];
    let told = facts(&Opened::start(home.path(), &serve, "").link()).await;
    assert_eq!((&told["trace"], &told["usual"]), (&"figures".into(), &"paper".into()));
    // Settings apply to the playground too.
    let file = home.path().join("mine.toml");
    std::fs::write(&file, "[gateway]\ntrace = \"none\"\n").unwrap();
    let own =
        ["playground", "--no-open", "--config", file.to_str().unwrap(), "--model", &model.url];
    assert_eq!(facts(&Opened::start(home.path(), &own, "").link()).await["trace"], "none");
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn a_browser_is_opened_with_the_link() {
    use std::os::unix::fs::PermissionsExt;
    let (home, model) = (tempfile::tempdir().unwrap(), Model::start(Reply::usual).await);
    let (browser, seen) = (home.path().join("xdg-open"), home.path().join("seen"));
    std::fs::write(&browser, format!("#!/bin/sh\nprintf %s \"$1\" > {}\n", seen.display()))
        .unwrap();
    std::fs::set_permissions(&browser, std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut opened = Opened::start(
        home.path(),
        &["playground", "--model", &model.url],
        home.path().to_str().unwrap(),
    );
    let (link, begun) = (opened.link(), Instant::now());
    while std::fs::read_to_string(&seen).unwrap_or_default() != link {
        assert!(begun.elapsed() < Duration::from_secs(10), "{link}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Without a browser the link is printed all the same.
    let mut without =
        Opened::start(home.path(), &["playground", "--model", &model.url], "/nowhere");
    assert_eq!(facts(&without.link()).await["model"], "m");
}
