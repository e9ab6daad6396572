//! Pictures in AVIF: one frame of AV1, or a grid of such tiles, and perhaps another for
//! transparency.

use bytes::Bytes;
use heifer::{
    Image,
    color::{ColorParams, frame_to_rgba_sized},
    heifer_hevc_dec::recon::Frame,
    heifer_isobmff::{
        HeifFile, ItemId,
        boxes::{ColorInfo, Property},
    },
};
use re_rav1d::dav1d::{
    Decoder, Picture, PixelLayout,
    PlanarImageComponent::{self, U, V, Y},
    Settings,
    pixel::YUVRange,
};

use super::{
    Limits,
    foreign::Pictures,
    heif::{open, single_picture},
};

/// The type of a picture that holds the transparency of another.
const ALPHA: &str = "urn:mpeg:mpegB:cicp:systems:auxiliary:alpha";
/// The colour matrices (ITU-T H.273) that are read; 2 means unspecified.
const MATRICES: [u16; 9] = [0, 1, 2, 4, 5, 6, 7, 9, 10];

/// The picture of a file, upright. For an image sequence, its primary picture.
pub(super) fn decode(bytes: &Bytes, limits: Limits) -> Result<Pictures, String> {
    let file = open(bytes, limits)?;
    let mut image = picture(&file, file.primary_id, limits)?;
    let is_alpha = |id: &ItemId| {
        let mut properties = file.item_properties(*id).into_iter().flatten();
        properties
            .any(|property| matches!(property, Property::AuxiliaryType(kind) if kind == ALPHA))
    };
    if let Some(alpha) = file.referencing_items(file.primary_id, b"auxl").into_iter().find(is_alpha)
    {
        let alpha = picture(&file, alpha, limits)?;
        if (alpha.width, alpha.height) != (image.width, image.height) {
            return Err("its transparency has another size than its picture".into());
        }
        for (pixel, alpha) in image.data.chunks_exact_mut(4).zip(alpha.data.chunks_exact(4)) {
            pixel[3] = alpha[0];
        }
    }
    for property in file.item_properties(file.primary_id).map_err(|error| error.to_string())? {
        image = match property {
            Property::Rotation(quarters) if *quarters > 0 => image.rotate_ccw(*quarters),
            Property::Mirror(is_upside_down) => image.mirror(*is_upside_down),
            _ => image,
        };
    }
    single_picture(image)
}

fn picture(file: &HeifFile<'_>, id: ItemId, limits: Limits) -> Result<Image<u8>, String> {
    let item = file.item(id).map_err(|error| error.to_string())?;
    if item.item_type.0 != *b"grid" {
        return single_frame(file, id, limits);
    }
    let grid = file.grid(id).map_err(|error| error.to_string())?;
    if u64::from(grid.output_width) * u64::from(grid.output_height) > limits.pixels {
        return Err(format!("its tiles make more than {} pixels (images.pixels)", limits.pixels));
    }
    let mut whole =
        Image::filled_samples(grid.output_width, grid.output_height, 8, [0, 0, 0, u8::MAX]);
    let (rows, columns) = (usize::from(grid.rows), usize::from(grid.columns));
    let tiles = file.referenced_items(id, b"dimg");
    if tiles.len() != rows * columns {
        return Err(format!("it has {} tiles, and not {rows} x {columns}", tiles.len()));
    }
    for (row, tiles) in (0..).zip(tiles.chunks_exact(columns)) {
        for (column, tile) in (0..).zip(tiles) {
            let tile = single_frame(file, *tile, limits)?;
            whole.draw(&tile, column * i64::from(tile.width), row * i64::from(tile.height));
        }
    }
    Ok(whole)
}

/// A picture that is one frame of AV1.
fn single_frame(file: &HeifFile<'_>, id: ItemId, limits: Limits) -> Result<Image<u8>, String> {
    let item = file.item(id).map_err(|error| error.to_string())?;
    if item.item_type.0 != *b"av01" {
        return Err(format!("a picture in it is of type {}, which is not read", item.item_type));
    }
    let data = file.item_data(id).map_err(|error| error.to_string())?.into_owned();
    let decoded = first_frame(data, limits)?;
    let frame = frame(&decoded)?;
    let mut properties = file.item_properties(id).map_err(|error| error.to_string())?;
    let stated = properties.find_map(|property| match property {
        Property::Color(ColorInfo::Nclx { matrix, full_range, .. }) => {
            Some(ColorParams { matrix: *matrix, full_range: *full_range })
        }
        _ => None,
    });
    let colours = stated.unwrap_or_else(|| ColorParams::from_frame(&frame));
    if !MATRICES.contains(&colours.matrix) {
        return Err(format!("its colour matrix {} is not supported", colours.matrix));
    }
    Ok(frame_to_rgba_sized(&frame, colours, decoded.width(), decoded.height()))
}

/// The first frame of the data.
fn first_frame(data: Vec<u8>, limits: Limits) -> Result<Picture, String> {
    if data.is_empty() {
        return Err("a picture in it has no data".into());
    }
    let mut settings = Settings::new();
    settings.set_n_threads(1);
    settings.set_max_frame_delay(1);
    settings.set_all_layers(false);
    settings.set_frame_size_limit(u32::try_from(limits.pixels).unwrap_or(u32::MAX));
    let mut decoder = Decoder::with_settings(&settings).map_err(|error| error.to_string())?;
    match decoder.send_data(data, None, None, None) {
        Err(error) if !error.is_again() => return Err(error.to_string()),
        _ => {}
    }
    // The decoder may hold the frame back for a better layer; a second call returns it.
    let picture = decoder.get_picture().or_else(|_| decoder.get_picture());
    picture.map_err(|error| format!("its data can't be decoded: {error}"))
}

/// The samples of a picture. Colours have half or all of its width and height; odd sizes are made
/// even by repeating the edge.
fn frame(picture: &Picture) -> Result<Frame, String> {
    let (width, height) = (picture.width(), picture.height());
    let (across, down, format) = match picture.pixel_layout() {
        PixelLayout::I400 => (1, 1, 0),
        PixelLayout::I420 => (2, 2, 1),
        PixelLayout::I422 => (2, 1, 2),
        PixelLayout::I444 => (1, 1, 3),
    };
    let depth = picture.bits_per_component().and_then(|bits| u8::try_from(bits.0).ok());
    let depth = depth.ok_or("its samples have an odd number of bits")?;
    let (columns, rows) = (width.div_ceil(across), height.div_ceil(down));
    let whole = (columns * across, rows * down);
    let luma = samples(picture, Y, (width, height), whole, depth);
    let colour = |component| samples(picture, component, (columns, rows), (columns, rows), depth);
    let (widths, heights, planes) = if format == 0 {
        ([whole.0, 0, 0], [whole.1, 0, 0], [luma, Vec::new(), Vec::new()])
    } else {
        ([whole.0, columns, columns], [whole.1, rows, rows], [luma, colour(U), colour(V)])
    };
    Ok(Frame {
        widths,
        heights,
        planes,
        bit_depth: [depth; 2],
        chroma_format: format,
        full_range: picture.color_range() == YUVRange::Full,
        matrix_coeffs: picture.matrix_coefficients() as u8,
    })
}

fn samples(
    picture: &Picture,
    component: PlanarImageComponent,
    (width, height): (u32, u32),
    (columns, rows): (u32, u32),
    depth: u8,
) -> Vec<u16> {
    let plane = picture.plane(component);
    let stride = picture.stride(component) as usize;
    let mut samples = Vec::with_capacity(columns as usize * rows as usize);
    for row in 0..rows {
        let line = &plane[row.min(height - 1) as usize * stride..];
        let begin = samples.len();
        if depth > 8 {
            let pairs = line.as_chunks().0.iter().take(width as usize);
            samples.extend(pairs.map(|pair| u16::from_ne_bytes(*pair)));
        } else {
            samples.extend(line.iter().take(width as usize).map(|sample| u16::from(*sample)));
        }
        let last = samples[samples.len() - 1];
        samples.resize(begin + columns as usize, last);
    }
    samples
}
