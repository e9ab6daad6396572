//! `ecso models`: the models of the catalogue and their files.

pub(crate) mod catalogue;
mod pull;
pub(crate) mod store;

use std::{collections::BTreeSet, path::Path};

use anyhow::bail;
use serde_json::json;

use crate::{
    cli::{ModelsCommand, Source},
    settings,
};
use catalogue::{Catalogue, Model, ModelFile, Pypi};
use store::Store;

pub(crate) fn run(command: ModelsCommand, file: Option<&Path>) -> anyhow::Result<()> {
    let settings = settings::load_file(file)?;
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
    fn is_installed(&self, model: &Model) -> anyhow::Result<bool> {
        Ok(self.catalogue.required_files(model)?.iter().all(|file| self.store.has(file)))
    }

    fn list(&self) -> anyhow::Result<()> {
        println!("{:<14} {:>8}  {:<9} {:<19} about", "name", "size", "state", "licence");
        for model in &self.catalogue.models {
            let files = self.catalogue.files(model)?;
            let bytes: Option<u64> = files.iter().map(|file| file.bytes).sum();
            let size =
                bytes.map_or_else(|| "?".into(), |bytes| format!("{} MB", bytes / 1_000_000));
            let state = if self.is_installed(model)? { "installed" } else { "-" };
            let tried = if model.tried { "" } else { " (untested)" };
            println!(
                "{:<14} {size:>8}  {state:<9} {:<19} {}{tried}",
                model.name,
                licences(&files),
                model.about
            );
        }
        println!("\nRun `ecso models pull NAME` to download one.");
        match self.store.prefixes_size()? {
            0 => {}
            bytes => println!(
                "prefixes: {} MB of cached prompt prefixes; `ecso models remove prefixes` deletes them",
                bytes / 1_000_000
            ),
        }
        Ok(())
    }

    fn list_json(&self) -> anyhow::Result<()> {
        let file = |file: &&ModelFile| {
            let requirements = |pypi: &Pypi| -> Vec<String> {
                (1..=pypi.parts).map(|part| pypi.requirement(part)).collect()
            };
            json!({
                "name": file.name,
                "bytes": file.bytes,
                "sha256": file.sha256,
                "licence": file.licence,
                "here": self.store.has(file),
                "hub": file.hub.as_ref().map(|hub| format!("{}/{}", hub.repo, hub.file)),
                "pypi": file.pypi.as_ref().map(requirements),
            })
        };
        let mut models = Vec::new();
        for model in &self.catalogue.models {
            let files = self.catalogue.files(model)?;
            models.push(json!({
                "name": model.name,
                "about": model.about,
                "here": self.is_installed(model)?,
                "tried": model.tried,
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
        say!("{name} is installed; try `ecso ask QUERY --image FILE --model {name}`");
        Ok(())
    }

    fn verify(&self, name: Option<&str>) -> anyhow::Result<()> {
        let mut files = BTreeSet::new();
        for model in &self.catalogue.models {
            let is_checked = match name {
                Some(name) => name == self.catalogue.model(name)?.name && name == model.name,
                None => self.is_installed(model)?,
            };
            if is_checked {
                let tagger = self.store.installed_tagger(&self.catalogue, model)?;
                let model_files = self.catalogue.required_files(model)?.into_iter().chain(tagger);
                files.extend(model_files.map(|file| &file.name));
            }
        }
        if files.is_empty() {
            println!("no model is installed; run `ecso models pull` to download mini");
        }
        let mut wrong = 0;
        for file in files {
            match self.store.verify(self.catalogue.file(file)?) {
                Ok(()) => println!("{file}: ok"),
                Err(error) => {
                    wrong += 1;
                    println!("{file}: {error:#}");
                }
            }
        }
        if wrong > 0 {
            bail!(
                "{wrong} files are missing or damaged; run `ecso models remove NAME` and \
                 `ecso models pull NAME`"
            );
        }
        Ok(())
    }

    fn path(&self, name: &str) -> anyhow::Result<()> {
        let model = self.catalogue.model(name)?;
        for file in self.store.installed_files(&self.catalogue, model)? {
            println!("{}", self.store.path(&file.name).display());
        }
        Ok(())
    }

    fn remove(&self, name: &str) -> anyhow::Result<()> {
        if name == "prefixes" {
            println!("prefixes: removed, {} MB freed", self.store.remove_prefixes()? / 1_000_000);
            return Ok(());
        }
        let model = self.catalogue.model(name)?;
        let _lock = self.store.lock()?;
        let mut needed = BTreeSet::new();
        for other in self.catalogue.models.iter().filter(|other| other.name != name) {
            if self.is_installed(other)? {
                needed.extend(self.catalogue.files(other)?.iter().map(|file| &file.name));
            }
        }
        let mut freed = 0;
        for file in self.catalogue.files(model)? {
            if needed.contains(&file.name) {
                println!("{}: kept, because another model needs it", file.name);
            } else {
                freed += self.store.remove(file)?;
            }
        }
        println!("{name}: removed, {} MB freed", freed / 1_000_000);
        Ok(())
    }
}

fn licences(files: &[&ModelFile]) -> String {
    let licences: BTreeSet<&str> = files.iter().map(|file| file.licence.as_str()).collect();
    licences.into_iter().collect::<Vec<_>>().join(", ")
}
