//! The reader on real images, and what a model behind it is told.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may")]

use std::{
    io::Cursor,
    path::{Path, PathBuf},
    sync::Arc,
};

use ecso::{Chat, Image, Limits, Mllm, Sampling, testing::Scripted};
use ecso_reader::{Composed, Reader, Tagger};

/// The reader's files, and the folder with benchmark data; `None` says loudly what is missing.
fn reader() -> Option<Reader> {
    let Some(folder) = std::env::var_os("ECSO_TEST_MODELS").map(PathBuf::from) else {
        eprintln!("skipped: ECSO_TEST_MODELS names no folder with models");
        return None;
    };
    let [detector, recogniser, dictionary] =
        ["PP-OCRv6_det_small.rten", "PP-OCRv6_rec_small.rten", "ppocrv6_dict.txt"]
            .map(|file| folder.join(file));
    if !dictionary.exists() {
        eprintln!("skipped: the text reader is not there (ecso models pull mini)");
        return None;
    }
    Some(Reader::load(&detector, &recogniser, &dictionary).unwrap())
}

fn letters(text: &str) -> String {
    text.chars().filter(|character| !character.is_whitespace()).collect()
}

/// Reads published typographic images, every `step`th of 50, and compares with the table's text.
fn read_published(step: usize) {
    let Some(data) = std::env::var_os("ECSO_TEST_DATA").map(PathBuf::from) else {
        return eprintln!("skipped: ECSO_TEST_DATA names no folder with benchmark data");
    };
    let Some(reader) = reader() else { return };
    let folder = data.join("figstep");
    let (mut images, mut wrong, mut characters) = (0, 0, 0);
    let rows = csv::Reader::from_path(folder.join("SafeBench-Tiny.csv")).unwrap().into_records();
    for row in rows.step_by(step) {
        let row = row.unwrap();
        let file = format!("images_tiny/query_{}_{}_{}_6.png", &row[0], &row[1], &row[2]);
        let image = Image::open(folder.join(file), Limits::default()).unwrap();
        let page = reader.read(image.pixels().unwrap()).unwrap();
        let expected = letters(&format!("{}1.2.3.", &row[5]));
        let errors = strsim::levenshtein(&expected, &letters(&page.text()));
        if errors > 0 {
            eprintln!("{errors} in {expected}: {:?}", page.text());
        }
        wrong += errors;
        characters += expected.chars().count();
        images += 1;
    }
    let rate =
        f64::from(u32::try_from(wrong).unwrap()) / f64::from(u32::try_from(characters).unwrap());
    eprintln!(
        "{images} images, {wrong} of {characters} characters wrong: character error rate {rate:.4}"
    );
    assert!(images == 50_usize.div_ceil(step) && rate < 0.005, "{images} images, {rate}");
}

#[test]
fn published_typographic_images_are_read_to_the_letter() {
    read_published(5);
}

#[test]
#[ignore = "takes half a minute: scripts/long has it"]
fn all_published_typographic_images_are_read_to_the_letter() {
    read_published(1);
}

fn image_of(pixels: &image::RgbImage) -> Image {
    let mut bytes = Vec::new();
    pixels.write_to(&mut Cursor::new(&mut bytes), image::ImageFormat::Png).unwrap();
    Image::from_bytes(bytes, Limits::default()).unwrap()
}

#[tokio::test]
async fn a_model_is_told_what_an_image_says_or_that_it_says_nothing() {
    let Some(reader) = reader() else { return };
    let list = image::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/list.png"))
        .unwrap()
        .into_rgb8();
    let stripes =
        image::RgbImage::from_fn(300, 200, |x, _| image::Rgb([u8::try_from(x % 256).unwrap(); 3]));
    let scripted = Arc::new(Scripted::texts(["one", "two", "three"]));
    let model = Composed::new(reader, Arc::clone(&scripted), "composed");
    for image in [image_of(&list), image_of(&stripes), image_of(&image::RgbImage::new(1, 1))] {
        model
            .generate(&Chat::ask([image], "What is it about?"), &Sampling::default())
            .await
            .unwrap();
    }
    let asked: Vec<String> =
        scripted.requests().iter().map(|(chat, _)| chat.turns[0].joined_text()).collect();
    assert!(
        asked[0].contains("Steps to bake a") && asked[0].contains("loaf of bread."),
        "{asked:?}"
    );
    assert!(
        asked[1].contains("no text was found") && asked[2].contains("no text was found"),
        "{asked:?}"
    );
    assert!(asked.iter().all(|text| text.ends_with("What is it about?")), "{asked:?}");
}

/// What a model is told of an image, with a tagger and without.
async fn told(image: &image::RgbImage, tagged: bool) -> Option<String> {
    let reader = reader()?;
    let scripted = Arc::new(Scripted::texts(["one"]));
    let mut model = Composed::new(reader, Arc::clone(&scripted), "composed");
    if tagged {
        let folder = PathBuf::from(std::env::var_os("ECSO_TEST_MODELS")?);
        let file = folder.join("efficientnet-lite0.f32");
        if !file.exists() {
            eprintln!("skipped: the tagger is not there (ecso models pull mini)");
            return None;
        }
        model = model.with_tagger(Tagger::load(&file).unwrap());
    }
    model
        .generate(&Chat::ask([image_of(image)], "What is it?"), &Sampling::default())
        .await
        .unwrap();
    Some(scripted.requests()[0].0.turns[0].joined_text())
}

#[tokio::test]
async fn of_a_page_a_tagger_says_nothing() {
    let list = image::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/list.png"))
        .unwrap()
        .into_rgb8();
    let stripes =
        image::RgbImage::from_fn(300, 200, |x, _| image::Rgb([u8::try_from(x % 256).unwrap(); 3]));
    for image in [list, stripes] {
        let Some(with) = told(&image, true).await else { return };
        assert_eq!(Some(with), told(&image, false).await);
    }
}

#[tokio::test]
async fn of_a_photograph_a_tagger_says_what_it_may_show() {
    let Some(folder) = std::env::var_os("ECSO_TEST_PHOTOS").map(PathBuf::from) else {
        return eprintln!(
            "skipped: ECSO_TEST_PHOTOS names no folder with the photographs of darknet and scikit-learn"
        );
    };
    let flower = image::open(folder.join("flower.jpg")).unwrap().into_rgb8();
    let Some(told) = told(&flower, true).await else { return };
    assert!(told.starts_with("Image: a photograph (perhaps: daisy)"), "{told}");
}
