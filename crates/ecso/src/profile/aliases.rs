//! Earlier keys of profiles, which are read for one more version.

use super::ProfileError;

/// Old and new keys of questions.
const OF_QUESTIONS: [(&str, &str); 2] = [("even", "prior"), ("alternatives", "top_logprobs")];

/// Old and new top-level keys.
const OF_PROFILES: [(&str, &str); 3] =
    [("filtered", "content_filter"), ("ways", "detectors"), ("spare", "early_exit")];

/// Old and new keys of a detector's terms.
const OF_TERMS: [(&str, &str); 2] = [("most", "max"), ("from", "ask_from")];

/// Keys of `hardened` that no longer exist.
const OF_HARDENED: [&str; 6] =
    ["look", "check", "detect", "request_check", "reply_check", "help_check"];

/// Changes to a profile of `method`, with old keys replaced by new ones.
pub(super) fn renamed(mut changes: toml::Table, method: &str) -> Result<toml::Table, ProfileError> {
    let method = changes.get("method").and_then(toml::Value::as_str).unwrap_or(method).to_owned();
    match changes.remove("refusals") {
        Some(toml::Value::String(kind)) if kind == "safe" => {
            let why = "refusals = \"safe\" was removed: the opening of an answer no longer decides the verdict; `hardened` asks whether it helps";
            return Err(ProfileError::invalid(why));
        }
        _ => {}
    }
    if method == "hardened"
        && let Some(old) = OF_HARDENED.iter().find(|old| changes.contains_key(**old))
    {
        let why = format!(
            "{old} was removed: `hardened` asks plain questions now, under [questions], and [[detectors]] combine them"
        );
        return Err(ProfileError::invalid(why));
    }
    if let Some(toml::Value::Table(question)) = changes.get_mut("detect") {
        for (old, new) in OF_QUESTIONS {
            move_key(question, old, new);
        }
    }
    for (old, new) in OF_PROFILES {
        move_key(&mut changes, old, new);
    }
    let detectors = changes.get_mut("detectors").and_then(toml::Value::as_array_mut);
    let terms = detectors
        .into_iter()
        .flatten()
        .filter_map(|detector| detector.get_mut("terms")?.as_array_mut());
    for term in terms.flatten().filter_map(toml::Value::as_table_mut) {
        for (old, new) in OF_TERMS {
            move_key(term, old, new);
        }
    }
    Ok(changes)
}

/// `old` becomes `new`; where both are there, what `new` has already stays.
fn move_key(table: &mut toml::Table, old: &str, new: &str) {
    let Some(value) = table.remove(old) else { return };
    match (table.get_mut(new), value) {
        (Some(toml::Value::Table(there)), toml::Value::Table(more)) => {
            for (key, value) in more {
                there.entry(key).or_insert(value);
            }
        }
        (Some(_), _) => {}
        (None, value) => {
            table.insert(new.to_owned(), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::Profile;

    #[test]
    fn the_keys_of_before_are_read_or_said_to_be_gone() {
        let paper = Profile::paper();
        assert_eq!(
            paper.with("detect.even", "0.3").unwrap(),
            paper.with("detect.prior", "0.3").unwrap()
        );
        let hardened = Profile::named("hardened").unwrap();
        assert_eq!(
            hardened.with("spare", "false").unwrap(),
            hardened.with("early_exit", "false").unwrap()
        );
        let ways = "[[ways]]\nname = \"reply\"\nbias = 0.0\nterms = [{ question = \"howto\", weight = 1.0, most = 2.0, from = -1.0 }]\n\
            [[ways]]\nname = \"request\"\nbias = 0.0\nterms = [{ question = \"gladly\", weight = 1.0 }]";
        let today =
            ways.replace("ways", "detectors").replace("most", "max").replace("from", "ask_from");
        let read = |text: &str| {
            Profile::from_toml(&format!("extends = \"hardened\"\nname = \"own\"\n{text}")).unwrap()
        };
        assert_eq!(read(ways), read(&today));
        for old in
            ["refusals = \"safe\"", "[look]\nthreshold = 0.7", "[request_check]\nprior = 0.3"]
        {
            let error = Profile::from_toml(&format!("extends = \"hardened\"\n{old}")).unwrap_err();
            assert!(error.to_string().contains("was removed"), "{error}");
        }
    }
}
