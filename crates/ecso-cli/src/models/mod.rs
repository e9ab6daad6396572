//! `ecso models`: the files behind the names that `--model` takes.

pub(crate) mod catalogue;
mod pull;
pub(crate) mod store;

use std::{collections::BTreeSet, path::Path};

use anyhow::bail;
use serde_json::json;

use crate::{
    UsageError,
    cli::{ModelArgs, ModelsCommand, ProfileArgs, Source},
    config,
};
use catalogue::{Catalogue, Model, ModelFile};
use store::Store;

pub(crate) fn run(command: ModelsCommand, file: Option<&Path>) -> anyhow::Result<()> {
    let settings = config::load(file, &ModelArgs::default(), &ProfileArgs::default())?;
    let models = Models { catalogue: Catalogue::load()?, store: Store::new(&settings.models_dir) };
    match command {
        ModelsCommand::List { json: true } => models.list_json(),
        ModelsCommand::List { json: false } => models.list(),
        ModelsCommand::Pull { name, from } => models.pull(&name, from),
        ModelsCommand::Verify { name } => models.verify(name.as_deref()),
        ModelsCommand::Path { name } => models.path(&name),
        ModelsCommand::Remove { name } => models.remove(&name),
    }
}

struct Models {
    catalogue: Catalogue,
    store: Store,
}

impl Models {
    fn here(&self, model: &Model) -> anyhow::Result<bool> {
        Ok(self.catalogue.needed(model)?.iter().all(|file| self.store.has(file)))
    }

    fn list(&self) -> anyhow::Result<()> {
        println!("{:<14} {:>8}  {:<9} {:<19} about", "name", "size", "state", "licence");
        for model in &self.catalogue.models {
            let files = self.catalogue.files(model)?;
            let bytes: Option<u64> = files.iter().map(|file| file.bytes).sum();
            let size =
                bytes.map_or_else(|| "?".into(), |bytes| format!("{} MB", bytes / 1_000_000));
            let state = if self.here(model)? { "here" } else { "-" };
            let tried = if model.tried { "" } else { " (not tried here)" };
            println!(
                "{:<14} {size:>8}  {state:<9} {:<19} {}{tried}",
                model.name,
                licences(&files),
                model.about
            );
        }
        println!("\n`ecso models pull NAME` gets one.");
        match self.store.heads()? {
            0 => {}
            bytes => println!(
                "heads: {} MB of prompts' beginnings, computed once; `ecso models remove heads`",
                bytes / 1_000_000
            ),
        }
        Ok(())
    }

    fn list_json(&self) -> anyhow::Result<()> {
        let file = |file: &&ModelFile| {
            json!({
                "name": file.name, "bytes": file.bytes, "sha256": file.sha256, "licence": file.licence,
                "here": self.store.has(file), "hub": file.hub.as_ref().map(|hub| format!("{}/{}", hub.repo, hub.file)),
                "pypi": file.pypi.as_ref().map(|pypi| (1..=pypi.parts).map(|part| pypi.requirement(part)).collect::<Vec<_>>()),
            })
        };
        let mut models = Vec::new();
        for model in &self.catalogue.models {
            let files = self.catalogue.files(model)?;
            models.push(json!({
                "name": model.name, "about": model.about, "here": self.here(model)?, "tried": model.tried,
                "files": files.iter().map(file).collect::<Vec<_>>(),
            }));
        }
        println!("{}", serde_json::to_string_pretty(&models)?);
        Ok(())
    }

    fn pull(&self, name: &str, from: Source) -> anyhow::Result<()> {
        let model = self.catalogue.model(name)?;
        let _lock = self.store.lock()?;
        let mut wheels = pull::Wheels::new(self.store.path(".wheels"))?;
        for file in self.catalogue.files(model)? {
            pull::pull(&self.store, file, from, &mut wheels)?;
        }
        say!("{name} is here; `ecso ask QUERY --image FILE --model {name}` asks it.");
        Ok(())
    }

    fn verify(&self, name: Option<&str>) -> anyhow::Result<()> {
        let mut files = BTreeSet::new();
        for model in &self.catalogue.models {
            let wanted = match name {
                Some(name) => name == self.catalogue.model(name)?.name && name == model.name,
                None => self.here(model)?,
            };
            if wanted {
                files.extend(self.catalogue.needed(model)?.iter().map(|file| &file.name));
                files.extend(
                    tagger_here(&self.catalogue, &self.store, model)?.map(|file| &file.name),
                );
            }
        }
        if files.is_empty() {
            println!("no model is here; `ecso models pull` gets mini");
        }
        let mut wrong = 0;
        for file in files {
            match self.store.verify(self.catalogue.file(file)?) {
                Ok(()) => println!("{file}: good"),
                Err(error) => {
                    wrong += 1;
                    println!("{file}: {error:#}");
                }
            }
        }
        if wrong > 0 {
            bail!(
                "{wrong} files are missing or damaged; `ecso models remove NAME`, then `ecso models pull NAME`"
            );
        }
        Ok(())
    }

    fn path(&self, name: &str) -> anyhow::Result<()> {
        for path in files_here(&self.catalogue, &self.store, name)? {
            println!("{}", path.display());
        }
        Ok(())
    }

    fn remove(&self, name: &str) -> anyhow::Result<()> {
        if name == "heads" {
            println!("heads: removed, {} MB freed", self.store.remove_heads()? / 1_000_000);
            return Ok(());
        }
        let model = self.catalogue.model(name)?;
        let _lock = self.store.lock()?;
        let mut needed = BTreeSet::new();
        for other in self.catalogue.models.iter().filter(|other| other.name != name) {
            if self.here(other)? {
                needed.extend(self.catalogue.files(other)?.iter().map(|file| &file.name));
            }
        }
        let mut freed = 0;
        for file in self.catalogue.files(model)? {
            if needed.contains(&file.name) {
                println!("{}: kept, another model needs it", file.name);
            } else {
                freed += self.store.remove(file)?;
            }
        }
        println!("{name}: removed, {} MB freed", freed / 1_000_000);
        Ok(())
    }
}

/// The paths of a model's files, all of which are here but perhaps the tagger's.
fn files_here(
    catalogue: &Catalogue,
    store: &Store,
    name: &str,
) -> anyhow::Result<Vec<std::path::PathBuf>> {
    let model = catalogue.model(name)?;
    let files = catalogue.needed(model)?;
    if !files.iter().all(|file| store.has(file)) {
        return Err(UsageError(format!(
            "{name} is not here yet; get it with `ecso models pull {name}`"
        ))
        .into());
    }
    Ok(files
        .into_iter()
        .chain(tagger_here(catalogue, store, model)?)
        .map(|file| store.path(&file.name))
        .collect())
}

/// The file of a model's tagger, if it has one and that is here.
pub(crate) fn tagger_here<'a>(
    catalogue: &'a Catalogue,
    store: &Store,
    model: &Model,
) -> anyhow::Result<Option<&'a ModelFile>> {
    let file = model.tagger.as_ref().map(|name| catalogue.file(name)).transpose()?;
    Ok(file.filter(|file| store.has(file)))
}

/// A model of the catalogue whose files are all here, with the folder they are in.
#[cfg(feature = "engine")]
pub(crate) fn find(name: &str, folder: &Path) -> anyhow::Result<(Model, Store)> {
    let (catalogue, store) = (Catalogue::load()?, Store::new(folder));
    files_here(&catalogue, &store, name)?;
    let model = catalogue.models.into_iter().find(|model| model.name == name);
    Ok((model.ok_or_else(|| UsageError(format!("no model is called {name}")))?, store))
}

fn licences(files: &[&ModelFile]) -> String {
    let licences: BTreeSet<&str> = files.iter().map(|file| file.licence.as_str()).collect();
    licences.into_iter().collect::<Vec<_>>().join(", ")
}
