//! Two doors, one decision: whoever has the draft already gets what the guard would have said of
//! its own.

use ecso::{Chat, Guard, Profile, Role, Turn};
use proptest::prelude::*;

use crate::{
    hardened::{Opinion, hardened, model},
    method::picture,
};

/// Every value of every enum that a profile has.
const CHOICES: [(&str, &[&str]); 10] = [
    ("scope", &["images", "all"]),
    ("gate", &["detected", "always", "never"]),
    ("rewrite", &["safe", "refuse"]),
    ("image_order", &["before", "after"]),
    ("empty_caption", &["hints", "plain", "refuse"]),
    ("turns", &["last", "all"]),
    ("content_filter", &["error", "harm"]),
    ("strip", &["true", "false"]),
    ("caption.mode", &["query-aware", "generic"]),
    ("safe.image", &["exclude", "include"]),
];

const PARSERS: [&str; 4] = ["paper", "substring", "fail-closed", "score"];

/// What step 4 says, one try after the other.
static SAFE: [&[&str]; 3] = [&["A better list."], &["too much", "A better list."], &["too much"]];

fn any_profile() -> impl Strategy<Value = Profile> {
    let choices = proptest::collection::vec(any::<prop::sample::Index>(), CHOICES.len());
    let questions =
        ["detect", "questions.words", "questions.message", "questions.helps", "questions.harms"];
    let parsers = proptest::collection::vec((0..4_usize, any::<bool>()), questions.len());
    (any::<bool>(), choices, parsers).prop_map(move |(is_paper, choices, parsers)| {
        let mut profile = if is_paper { Profile::paper() } else { hardened() };
        for ((key, values), choice) in CHOICES.iter().zip(choices) {
            profile = profile.with(key, values[choice.index(values.len())]).unwrap();
        }
        for (question, (parser, sees)) in questions.iter().zip(parsers) {
            if is_paper == (*question == "detect") {
                profile = profile.with(&format!("{question}.parser"), PARSERS[parser]).unwrap();
                let image = if sees { "include" } else { "exclude" };
                profile = profile.with(&format!("{question}.image"), image).unwrap();
            }
        }
        profile
    })
}

fn any_chat() -> impl Strategy<Value = Chat> {
    (any::<bool>(), any::<bool>(), 1..3_usize).prop_map(|(has_system, has_past, images)| {
        let mut chat = Chat::ask((0..images).map(|_| picture()), "Fill the list.");
        if has_past {
            let past = [Turn::text(Role::User, "Hello."), Turn::text(Role::Assistant, "Hello!")];
            chat.turns.splice(0..0, past);
        }
        if has_system { chat.with_system("Be brief.") } else { chat }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]
    #[test]
    fn both_doors_come_to_the_same_verdict(
        profile in any_profile(),
        chat in any_chat(),
        likely in proptest::collection::vec(0.001..0.999_f32, 5),
        draft in prop::sample::select(&["A list.", " ", "Sorry for the wait!", "I'm sorry, but I can't help with that.", "too much"]),
        safe in prop::sample::select(&SAFE),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let opinion = Opinion {
            words: likely[0],
            handed: likely[1],
            message: likely[2],
            helps: likely[3],
            harms: likely[4],
        };
        let guard = |draft| Guard::new(model(opinion, draft, safe), profile.clone());
        let answered = runtime.block_on(guard(draft).answer(&chat));
        let reviewed = runtime.block_on(guard(draft).review(&chat, draft));
        let told = |outcome: ecso::Outcome| {
            (outcome.verdict, outcome.score, outcome.answer, outcome.rewritten, outcome.refused)
        };
        prop_assert_eq!(answered.map(told), reviewed.map(told));
    }
}
