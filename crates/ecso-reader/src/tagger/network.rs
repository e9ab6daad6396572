//! `EfficientNet-Lite0` (arXiv 1905.11946): its convolutions, and how they are run.

use ecso::Cause;
use rten::{
    BufferPool, FloatOperators,
    ops::{Padding, conv, gemm, global_average_pool},
};
use rten_tensor::{NdTensor, NdTensorView, Tensor, prelude::*};

use super::TaggerError;

/// Width and height of the network's input, in pixels.
pub(super) const SIDE: u32 = 224;
/// The number of classes.
pub(super) const CLASSES: usize = 1000;
/// The number of the classifier's inputs.
pub(super) const FEATURES: usize = 1280;

/// A convolution with the batch norm after it.
pub(super) struct Layer {
    /// The convolution's name in the package.
    pub(super) name: String,
    /// The batch norm's name in the package.
    pub(super) norm: String,
    /// Output channels, input channels per group, height, width.
    pub(super) kernel: [usize; 4],
    stride: usize,
    groups: usize,
    /// Whether its activation is `ReLU6`, which clamps to 0..=6.
    is_relu6: bool,
}

/// The layers of the network, in order. The layers of a group run one after the other. The group's
/// input is added to its output if both have the same shape, except in the first and last group.
pub(super) fn groups() -> Vec<Vec<Layer>> {
    let mut groups = vec![vec![dense("_conv_stem", "_bn0", [32, 3, 3, 3], 2)]];
    // Repeats, kernel, stride of the first, expansion, input and output channels.
    let stages = [
        (1, 3, 1, 1, 32, 16),
        (2, 3, 2, 6, 16, 24),
        (2, 5, 2, 6, 24, 40),
        (3, 3, 2, 6, 40, 80),
        (3, 5, 1, 6, 80, 112),
        (4, 5, 2, 6, 112, 192),
        (1, 3, 1, 6, 192, 320),
    ];
    for (repeats, kernel, first_stride, expansion, from, to) in stages {
        for repeat in 0..repeats {
            let (stride, from) = if repeat == 0 { (first_stride, from) } else { (1, to) };
            let block = format!("_blocks.{}.", groups.len() - 1);
            let part = |name: &str| format!("{block}{name}");
            let wide = from * expansion;
            let mut layers = Vec::new();
            if expansion > 1 {
                layers.push(dense(part("_expand_conv"), part("_bn0"), [wide, from, 1, 1], 1));
            }
            let depthwise =
                dense(part("_depthwise_conv"), part("_bn1"), [wide, 1, kernel, kernel], stride);
            layers.push(Layer { groups: wide, ..depthwise });
            layers.push(Layer {
                is_relu6: false,
                ..dense(part("_project_conv"), part("_bn2"), [to, wide, 1, 1], 1)
            });
            groups.push(layers);
        }
    }
    groups.push(vec![dense("_conv_head", "_bn1", [FEATURES, 320, 1, 1], 1)]);
    groups
}

fn dense(
    name: impl Into<String>,
    norm: impl Into<String>,
    kernel: [usize; 4],
    stride: usize,
) -> Layer {
    Layer { name: name.into(), norm: norm.into(), kernel, stride, groups: 1, is_relu6: true }
}

/// The network with its weights.
pub(super) struct Network {
    groups: Vec<Vec<Convolution>>,
    /// Shape [classes, features].
    classifier: NdTensor<f32, 2>,
    /// Shape [1, classes].
    bias: NdTensor<f32, 2>,
}

struct Convolution {
    layer: Layer,
    kernel: NdTensor<f32, 4>,
    bias: NdTensor<f32, 1>,
}

impl Network {
    /// The network from its weights in order: kernel and bias of each layer, the classifier and its
    /// bias. `None` if there are too few or too many.
    pub(super) fn new(floats: &[f32]) -> Option<Self> {
        let mut rest = floats;
        let mut take = |count: usize| {
            let (taken, left) = rest.split_at_checked(count)?;
            rest = left;
            Some(taken.to_vec())
        };
        let mut convolution = |layer: Layer| {
            let kernel = NdTensor::from_data(layer.kernel, take(layer.kernel.iter().product())?);
            let bias = NdTensor::from_data([layer.kernel[0]], take(layer.kernel[0])?);
            Some(Convolution { layer, kernel, bias })
        };
        let groups =
            groups().into_iter().map(|layers| layers.into_iter().map(&mut convolution).collect());
        let groups = groups.collect::<Option<_>>()?;
        let classifier = NdTensor::from_data([CLASSES, FEATURES], take(CLASSES * FEATURES)?);
        let bias = NdTensor::from_data([1, CLASSES], take(CLASSES)?);
        rest.is_empty().then_some(Self { groups, classifier, bias })
    }

    /// The probability of each class. `picture` has shape [1, 3, `SIDE`, `SIDE`], red first.
    pub(super) fn run(&self, picture: NdTensorView<f32, 4>) -> Result<Vec<f32>, TaggerError> {
        let pool = BufferPool::new();
        let mut state = picture.to_tensor().into_dyn();
        for group in &self.groups {
            let mut inner = None;
            for convolution in group {
                inner = Some(convolution.run(&pool, inner.as_ref().unwrap_or(&state))?);
            }
            let Some(mut inner) = inner else { continue };
            if group.len() > 1 && inner.shape() == state.shape() {
                inner = rten::ops::add(&pool, inner.view(), state.view()).map_err(failed)?;
            }
            state = inner;
        }
        let features = global_average_pool(&pool, state.view()).map_err(failed)?;
        let (features, classifier, bias) =
            (features.reshaped([1, FEATURES]), &self.classifier, &self.bias);
        let scores = gemm(
            &pool,
            features.view().into_dyn(),
            classifier.view().into_dyn(),
            Some(bias.view().into_dyn()),
            1.0,
            1.0,
            false,
            true,
        );
        let probabilities = scores.and_then(|scores| scores.softmax(1)).map_err(failed)?;
        Ok(probabilities.to_vec())
    }
}

impl Convolution {
    fn run(&self, pool: &BufferPool, input: &Tensor) -> Result<Tensor, TaggerError> {
        let (kernel, bias, stride) =
            (self.kernel.view().into_dyn(), self.bias.view(), self.layer.stride);
        let padding = if self.kernel.size(2) == 1 { Padding::zero::<2>() } else { Padding::Same };
        let output = conv(
            pool,
            input.view(),
            kernel,
            Some(bias),
            padding,
            self.layer.groups,
            &[stride, stride],
            &[1, 1],
        );
        let mut output = output.map_err(failed)?;
        if self.layer.is_relu6 {
            output.apply(|value| value.clamp(0.0, 6.0));
        }
        Ok(output)
    }
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> TaggerError {
    TaggerError::Run(Cause::new(error.to_string(), error))
}
