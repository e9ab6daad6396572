//! Settings, help, completions and the manual.

use crate::{ecso, text};

#[test]
fn help_texts_are_pinned() {
    let home = tempfile::tempdir().unwrap();
    for (name, arguments) in [
        ("help", vec!["--help"]),
        ("ask", vec!["ask", "--help"]),
        ("pull", vec!["models", "pull", "--help"]),
    ] {
        let output = ecso(home.path())
            .env("COLUMNS", "100")
            .args(arguments)
            .assert()
            .success()
            .get_output()
            .clone();
        insta::assert_snapshot!(name, text(&output.stdout));
    }
}

#[test]
fn flags_override_environment_overrides_file_overrides_defaults() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("mine.toml");
    std::fs::write(
        &file,
        "model = \"from-file\"\nprofile = \"paper\"\n[server]\nretries = 7\n[set]\nscope = \"all\"\n",
    )
    .unwrap();
    let output = ecso(home.path())
        .args(["config", "show", "--mmproj", "p.gguf", "--config"])
        .arg(&file)
        .env("ECSO__MODEL", "from-environment")
        .env("ECSO__ENGINE__THREADS", "3")
        .env("OPENAI_API_KEY", "sk-secret")
        .assert()
        .success()
        .get_output()
        .clone();
    let shown = text(&output.stdout).replace(home.path().to_str().unwrap(), "HOME");
    assert!(!shown.contains("sk-secret"));
    let (settings, profile) = shown.split_once("\n# the profile\n").unwrap();
    assert!(profile.contains("scope = \"all\""), "{profile}");
    insta::assert_snapshot!(settings);
}

#[test]
fn unknown_keys_and_values_are_errors() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("mine.toml");
    for wrong in [
        "modle = \"x\"",
        "[engine]\nthread = 3",
        "not toml",
        "[server]\nretries = \"many\"",
        "[server]\nmax_tokens_field = \"most\"",
    ] {
        std::fs::write(&file, wrong).unwrap();
        let output = ecso(home.path())
            .args(["config", "show", "--config"])
            .arg(&file)
            .assert()
            .code(2)
            .get_output()
            .clone();
        let key = wrong
            .split([' ', '='])
            .next()
            .unwrap()
            .trim_start_matches("[engine]\n")
            .trim_start_matches("[server]\n");
        assert!(
            text(&output.stderr).contains(key.split_whitespace().next().unwrap()),
            "{wrong}: {}",
            text(&output.stderr)
        );
    }
    ecso(home.path()).args(["config", "show"]).env("ECSO__MODLE", "x").assert().code(2);
    for (name, says) in [
        (
            "SERVER__MAX_TOKENS_FIELD",
            "server.max_tokens_field: unknown variant `most`, expected one of `auto`, `max_tokens`",
        ),
        (
            "IMAGES__TRUNCATED",
            "images.truncated: unknown variant `most`, expected `refuse` or `accept`",
        ),
        (
            "GATEWAY__MODE",
            "gateway.mode: unknown variant `most`, expected one of `off`, `observe`, `enforce`",
        ),
    ] {
        let mut command = ecso(home.path());
        // A number from the environment is a text, which is valid.
        command.env("ECSO__ENGINE__THREADS", "3").env(format!("ECSO__{name}"), "most");
        let told = text(&command.args(["config", "show"]).assert().code(2).get_output().stderr);
        assert!(told.contains(says), "{told}");
    }
    for key in ["server.reply_timeout", "gateway.limits.patience", "gateway.limits.deadline"] {
        let variable = format!("ECSO__{}", key.to_uppercase().replace('.', "__"));
        let mut command = ecso(home.path());
        command.args(["config", "show"]).env(variable, "9223372036854775807");
        let told = text(&command.assert().code(2).get_output().stderr);
        assert!(told.contains(&format!("{key}: at most")), "{told}");
    }
}

#[test]
fn missing_files_and_variables_are_wrong_usage() {
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("model.gguf"), "GG").unwrap();
    std::fs::write(home.path().join("audit.jsonl"), "no audit\n").unwrap();
    let nobody = "http://127.0.0.1:9/v1";
    for (args, code, says) in [
        (&["ask", "Bread?", "--model", "gone.gguf"][..], 2, "gone.gguf: No such file"),
        (&["ask", "Bread?", "--model", "model.gguf"], 2, "model.gguf: this is not a GGUF file"),
        (
            &["ask", "Bread?", "--model", nobody, "--api-key-env", "NO_KEY"],
            2,
            "--api-key-env NO_KEY: this environment variable is not set",
        ),
        (
            &["serve", "--upstream", nobody, "--api-key-env", "NO_KEY"],
            2,
            "--api-key-env NO_KEY: this environment variable is not set",
        ),
        (
            &["replay", "audit.jsonl", "--model", nobody, "--model-name", "m"],
            2,
            "no line could be judged",
        ),
        (
            &["replay", "audit.jsonl", "--model", nobody, "--out", "gone/x.jsonl"],
            2,
            "--out gone/x.jsonl: No such file",
        ),
    ] {
        let output = ecso(home.path()).args(args).current_dir(home.path()).assert().code(code);
        let told = text(&output.get_output().stderr);
        assert!(told.contains(says), "{args:?}: {told}");
    }
}

#[test]
fn shells_get_completions() {
    let home = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output =
            ecso(home.path()).args(["completions", shell]).assert().success().get_output().clone();
        assert!(text(&output.stdout).contains("show-steps"), "{shell}");
    }
}

#[test]
fn the_manual_has_a_page_for_each_command() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().join("share/man1");
    ecso(home.path()).arg("manual").arg(&folder).assert().success();
    for (page, says) in
        [("ecso.1", "Exit codes"), ("ecso-ask.1", "show\\-steps"), ("ecso-models-pull.1", "mini")]
    {
        let written = std::fs::read_to_string(folder.join(page)).unwrap();
        assert!(written.contains(says), "{page}: {written}");
    }
    assert!(!folder.join("ecso-decode-image.1").exists());
    let file = home.path().join("file");
    std::fs::write(&file, "").unwrap();
    let output = ecso(home.path()).arg("manual").arg(&file).assert().code(1).get_output().clone();
    assert!(text(&output.stderr).contains("manual can't be written"), "{}", text(&output.stderr));
}

/// Nested keys too, every time: layers are applied in order, not in that of a hash map.
#[test]
fn deep_settings_come_from_the_environment() {
    let home = tempfile::tempdir().unwrap();
    for _ in 0..12 {
        let mut command = ecso(home.path());
        command.env("ECSO__GATEWAY__LIMITS__AT_ONCE", "3").env("ECSO__GATEWAY__LIMITS__QUEUE", "0");
        let shown = text(&command.args(["config", "show"]).assert().success().get_output().stdout);
        assert!(shown.contains("at_once = 3") && shown.contains("queue = 0"), "{shown}");
    }
}
