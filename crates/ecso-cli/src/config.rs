//! `ecso config`: the settings in effect.

use std::path::Path;

use crate::{
    cli::{ModelArgs, ProfileArgs},
    profiles, settings,
};

pub(crate) fn show(
    file: Option<&Path>,
    model: &ModelArgs,
    profile: &ProfileArgs,
) -> anyhow::Result<()> {
    let (settings, origins) = settings::load_with_origins(file, model, profile)?;
    for (key, value, origin) in origins.of(&settings)? {
        println!("{:<48} # {origin}", format!("{key} = {value}"));
    }
    let is_key_set = std::env::var_os(&settings.api_key_env).is_some();
    println!("# {} is {}", settings.api_key_env, if is_key_set { "set" } else { "not set" });
    println!("\n# the profile\n{}", profiles::load(&settings)?.to_toml());
    Ok(())
}
