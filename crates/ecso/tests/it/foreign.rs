//! Files that models don't read: with the features that read them they become images, without they
//! are named.

use ecso::{Image, ImageError, Limits, testing::pdf};

const HEIC: &[u8] = include_bytes!("../foreign/quarters.heic");
const ODD: &[u8] = include_bytes!("../foreign/odd.avif");

#[test]
fn what_this_build_does_not_read_is_named() {
    for (bytes, what, feature, is_built) in [
        (HEIC, "a HEIC image", "heic", cfg!(feature = "heic")),
        (ODD, "an AVIF image", "avif", cfg!(feature = "avif")),
        (&pdf(&[""]), "a PDF", "pdf", cfg!(feature = "pdf")),
    ] {
        match Image::from_bytes(bytes.to_vec(), Limits::default()) {
            Ok(image) => assert!(is_built && image.is_converted()),
            Err(error) => {
                assert!(
                    !is_built && error == ImageError::FeatureDisabled { what, feature },
                    "{error}"
                );
            }
        }
    }
}

#[cfg(all(feature = "heic", feature = "avif", feature = "pdf"))]
mod built {
    use ecso::Truncated;

    use super::*;

    const CLEAR: &[u8] = include_bytes!("../foreign/clear.avif");
    const TILES: &[u8] = include_bytes!("../foreign/tiles.avif");

    const RED: [u8; 3] = [200, 30, 30];
    const GREEN: [u8; 3] = [30, 160, 30];
    const BLUE: [u8; 3] = [30, 30, 200];
    const YELLOW: [u8; 3] = [230, 220, 40];
    const WHITE: [u8; 3] = [255; 3];

    /// Holds that a picture has these colours in its four quarters, nearly.
    fn has_quarters(bytes: &[u8], size: (u32, u32), quarters: [[u8; 3]; 4]) {
        let image = Image::from_bytes(bytes.to_vec(), Limits::default()).unwrap();
        assert_eq!(image.digest().as_bytes(), blake3::hash(bytes).as_bytes());
        assert_eq!(image.encoded().unwrap().1, "image/png");
        let pixels = image.pixels().unwrap();
        assert_eq!(pixels.dimensions(), size);
        let places =
            [(1, 1), (3, 1), (1, 3), (3, 3)].map(|(x, y)| (size.0 * x / 4, size.1 * y / 4));
        for ((x, y), wanted) in places.into_iter().zip(quarters) {
            let place = 3 * (y * pixels.width() + x) as usize;
            let found = &pixels.as_bytes()[place..place + 3];
            assert!(
                found.iter().zip(wanted).all(|(found, wanted)| found.abs_diff(wanted) < 12),
                "{x} {y}: {found:?}"
            );
        }
        let few = Limits { pixels: 100, ..Limits::default() };
        let error = Image::from_bytes(bytes.to_vec(), few).unwrap_err().to_string();
        assert!(error.contains("at most 100 in all are allowed"), "{error}");
    }

    #[test]
    fn photos_in_heic_are_read() {
        has_quarters(HEIC, (48, 32), [RED, GREEN, BLUE, YELLOW]);
    }

    #[test]
    fn pictures_in_avif_are_read() {
        // Ten bits, colours of half the size, and sides that two does not divide.
        has_quarters(ODD, (33, 25), [RED, GREEN, BLUE, YELLOW]);
        // Turned to the left; a quarter that can't be seen is white.
        has_quarters(CLEAR, (32, 48), [GREEN, YELLOW, WHITE, BLUE]);
        has_quarters(TILES, (128, 128), [RED, GREEN, BLUE, YELLOW]);
    }

    #[test]
    fn no_damage_is_worse_than_an_error() {
        let pdf = pdf(&["BT /F 12 Tf 5 10 Td (Bread) Tj ET"]);
        for whole in [HEIC, ODD, CLEAR, &pdf] {
            for place in (0..whole.len()).step_by(7) {
                let mut damaged = whole.to_vec();
                damaged[place] ^= 0xff;
                let limits =
                    Limits { pixels: 1 << 16, truncated: Truncated::Accept, ..Limits::default() };
                let _ = Image::pages(damaged, limits);
                let _ = Image::pages(whole[..place].to_vec(), limits);
            }
        }
    }

    const WORD: &str = "BT /F 12 Tf 5 10 Td (Bread) Tj ET";

    fn share_of_dark(image: &Image) -> f64 {
        let pixels = image.pixels().unwrap();
        let dark = pixels.as_bytes().chunks(3).filter(|pixel| pixel[0] < 128).count();
        f64::from(u32::try_from(dark).unwrap()) / f64::from(pixels.width() * pixels.height())
    }

    #[test]
    fn pages_are_images_in_their_order() {
        let file = pdf(&[WORD, "", "0 0 72 18 re f"]);
        let pages = Image::pages(file.clone(), Limits::default()).unwrap();
        assert_eq!(pages.len(), 3);
        // 150 pixels an inch.
        assert!(pages.iter().all(|page| page.pixels().unwrap().dimensions() == (150, 75)));
        let dark: Vec<f64> = pages.iter().map(share_of_dark).collect();
        assert!(
            (0.02..0.2).contains(&dark[0]) && dark[1] == 0.0 && (0.49..0.51).contains(&dark[2]),
            "{dark:?}"
        );
        let digests: Vec<_> = pages.iter().map(Image::digest).collect();
        assert!(digests[0] != digests[1] && digests[0] != blake3::hash(&file));
        let again = Image::pages(file.clone(), Limits::default()).unwrap();
        assert_eq!(again.iter().map(Image::digest).collect::<Vec<_>>(), digests);
        assert_eq!(
            Image::from_bytes(file, Limits::default()).unwrap_err(),
            ImageError::SeveralPages(3)
        );
        assert!(Image::from_bytes(pdf(&[WORD]), Limits::default()).is_ok());
    }

    #[test]
    fn more_than_is_allowed_is_an_error_and_no_page_is_left_out() {
        let limits = Limits { pages: 2, ..Limits::default() };
        let error = Image::pages(pdf(&["", "", ""]), limits).unwrap_err().to_string();
        assert!(error.contains("it has 3 pages; at most 2 are allowed (images.pages)"), "{error}");
        let file = pdf(&[WORD; 9]);
        let limits = Limits { bytes: file.len(), ..Limits::default() };
        let error = Image::pages(file, limits).unwrap_err().to_string();
        assert!(error.contains("what it shows takes more than"), "{error}");
    }

    #[test]
    fn all_pages_together_have_the_pixels_of_one_image() {
        let limits = Limits { pixels: 9000, ..Limits::default() };
        let pages = Image::pages(pdf(&[WORD; 5]), limits).unwrap();
        let sizes: Vec<_> = pages.iter().map(|page| page.pixels().unwrap().dimensions()).collect();
        let all: u32 = sizes.iter().map(|(width, height)| width * height).sum();
        assert!((8000..=9000).contains(&all), "{sizes:?}");
    }

    #[test]
    fn what_can_not_be_shown_says_why() {
        let mut cut = pdf(&[WORD, WORD]);
        cut.truncate(cut.len() - 10);
        assert_eq!(
            Image::pages(cut.clone(), Limits::default()).unwrap_err(),
            ImageError::Truncated { format: "PDF" }
        );
        let accepted = Limits { truncated: Truncated::Accept, ..Limits::default() };
        assert_eq!(Image::pages(cut, accepted).unwrap().len(), 2);
        let broken = b"%PDF-1.4\nnothing else\n%%EOF".to_vec();
        let error = Image::pages(broken, Limits::default()).unwrap_err().to_string();
        assert!(
            error.contains("this is a PDF that can't be shown as images: it is broken"),
            "{error}"
        );
        let error = Image::pages(pdf(&[]), Limits::default()).unwrap_err().to_string();
        assert!(error.contains("no page") || error.contains("broken"), "{error}");
    }
}
