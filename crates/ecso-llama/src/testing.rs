//! A tiny vision model with random weights, as a pair of GGUF files, for tests of the computation.
//! Its replies are noise.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

const EMBEDDING: u64 = 64;
const FEED_FORWARD: u64 = 128;
const LAYERS: u64 = 2;
const PATCH: u64 = 14;
const IMAGE_SIDE: u64 = 56;

/// The files of a model.
#[derive(Debug, Clone)]
pub struct TinyVlm {
    /// The language model: llama architecture, one token per byte.
    pub model: PathBuf,
    /// Its projector: CLIP for 56x56 pixels, and LLaVA's two-layer perceptron.
    pub mmproj: PathBuf,
}

/// Writes `tiny.gguf` and `tiny-mmproj.gguf` into `folder`. The bytes are always the same.
///
/// # Errors
/// If the files can't be written.
pub fn tiny_vlm(folder: &Path) -> io::Result<TinyVlm> {
    let files =
        TinyVlm { model: folder.join("tiny.gguf"), mmproj: folder.join("tiny-mmproj.gguf") };
    language_model("gpt-2").write(&files.model)?;
    projector().write(&files.mmproj)?;
    Ok(files)
}

/// Writes the language model to `path`, with another rule that splits text before it is tokenized.
///
/// # Errors
/// If the file can't be written.
pub fn tiny_llm(path: &Path, pre_tokenizer: &str) -> io::Result<()> {
    language_model(pre_tokenizer).write(path)
}

fn language_model(pre_tokenizer: &str) -> Gguf {
    let mut tokens: Vec<String> =
        (0..=u8::MAX).map(|byte| char::from_u32(spelled(byte)).into_iter().collect()).collect();
    let bytes = tokens.len();
    tokens.extend(["\u{120}t", "<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(str::to_owned));
    let vocabulary = tokens.len() as u64;
    let kinds = (0..tokens.len()).map(|token| if token > bytes { 3 } else { 1 }).collect();
    let mut gguf = Gguf::new("llama");
    gguf.set("general.name", Value::Text("tiny".into()));
    gguf.set("llama.context_length", Value::U32(2048));
    gguf.set("llama.embedding_length", number(EMBEDDING));
    gguf.set("llama.block_count", number(LAYERS));
    gguf.set("llama.feed_forward_length", number(FEED_FORWARD));
    gguf.set("llama.attention.head_count", Value::U32(4));
    gguf.set("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5));
    gguf.set("llama.rope.dimension_count", Value::U32(16));
    gguf.set("llama.vocab_size", number(vocabulary));
    gguf.set("tokenizer.ggml.model", Value::Text("gpt2".into()));
    gguf.set("tokenizer.ggml.pre", Value::Text(pre_tokenizer.into()));
    gguf.set("tokenizer.ggml.tokens", Value::Texts(tokens));
    gguf.set("tokenizer.ggml.token_type", Value::I32s(kinds));
    gguf.set("tokenizer.ggml.merges", Value::Texts(vec!["\u{120} t".into()]));
    gguf.set("tokenizer.ggml.bos_token_id", Value::U32(257));
    gguf.set("tokenizer.ggml.eos_token_id", Value::U32(259));
    gguf.set("tokenizer.ggml.add_bos_token", Value::Bool(false));
    let template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}\
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    gguf.set("tokenizer.chat_template", Value::Text(template.into()));

    gguf.weights("token_embd.weight", &[EMBEDDING, vocabulary]);
    gguf.weights("output.weight", &[EMBEDDING, vocabulary]);
    gguf.ones("output_norm.weight", EMBEDDING);
    for layer in 0..LAYERS {
        for norm in ["attn_norm", "ffn_norm"] {
            gguf.ones(&format!("blk.{layer}.{norm}.weight"), EMBEDDING);
        }
        for square in ["attn_q", "attn_k", "attn_v", "attn_output"] {
            gguf.weights(&format!("blk.{layer}.{square}.weight"), &[EMBEDDING, EMBEDDING]);
        }
        gguf.weights(&format!("blk.{layer}.ffn_gate.weight"), &[EMBEDDING, FEED_FORWARD]);
        gguf.weights(&format!("blk.{layer}.ffn_up.weight"), &[EMBEDDING, FEED_FORWARD]);
        gguf.weights(&format!("blk.{layer}.ffn_down.weight"), &[FEED_FORWARD, EMBEDDING]);
    }
    gguf
}

fn projector() -> Gguf {
    let patches = (IMAGE_SIDE / PATCH) * (IMAGE_SIDE / PATCH);
    let mut gguf = Gguf::new("clip");
    gguf.set("clip.has_vision_encoder", Value::Bool(true));
    gguf.set("clip.has_llava_projector", Value::Bool(true));
    gguf.set("clip.projector_type", Value::Text("mlp".into()));
    gguf.set("clip.use_gelu", Value::Bool(true));
    gguf.set("clip.vision.image_size", number(IMAGE_SIDE));
    gguf.set("clip.vision.patch_size", number(PATCH));
    gguf.set("clip.vision.embedding_length", number(EMBEDDING));
    gguf.set("clip.vision.feed_forward_length", number(FEED_FORWARD));
    gguf.set("clip.vision.projection_dim", number(EMBEDDING));
    gguf.set("clip.vision.block_count", number(LAYERS));
    gguf.set("clip.vision.attention.head_count", Value::U32(4));
    gguf.set("clip.vision.attention.layer_norm_epsilon", Value::F32(1e-5));
    gguf.set("clip.vision.image_mean", Value::F32s(vec![0.5; 3]));
    gguf.set("clip.vision.image_std", Value::F32s(vec![0.5; 3]));

    gguf.weights("v.class_embd", &[EMBEDDING]);
    gguf.weights("v.patch_embd.weight", &[PATCH, PATCH, 3, EMBEDDING]);
    gguf.weights("v.position_embd.weight", &[EMBEDDING, patches + 1]);
    gguf.norm("v.pre_ln");
    for layer in 0..LAYERS {
        for norm in ["ln1", "ln2"] {
            gguf.norm(&format!("v.blk.{layer}.{norm}"));
        }
        for square in ["attn_q", "attn_k", "attn_v", "attn_out"] {
            gguf.linear(&format!("v.blk.{layer}.{square}"), EMBEDDING, EMBEDDING);
        }
        gguf.linear(&format!("v.blk.{layer}.ffn_up"), EMBEDDING, FEED_FORWARD);
        gguf.linear(&format!("v.blk.{layer}.ffn_down"), FEED_FORWARD, EMBEDDING);
    }
    gguf.linear("mm.0", EMBEDDING, EMBEDDING);
    gguf.linear("mm.2", EMBEDDING, EMBEDDING);
    gguf
}

/// The code point by which GPT-2's vocabulary spells a byte: printable ones as themselves, the
/// others from U+0100 on.
fn spelled(byte: u8) -> u32 {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return byte.into();
    }
    let before = (0..byte).filter(|byte| !printable(*byte)).count();
    0x100 + u32::try_from(before).unwrap_or_default()
}

fn number(value: u64) -> Value {
    Value::U32(u32::try_from(value).unwrap_or(u32::MAX))
}

enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
}

/// A GGUF file, version 3, all tensors in 32-bit floats.
struct Gguf {
    values: Vec<(String, Value)>,
    tensors: Vec<(String, Vec<u64>, Vec<f32>)>,
    random: u64,
}

impl Gguf {
    fn new(architecture: &str) -> Self {
        let values = vec![("general.architecture".to_owned(), Value::Text(architecture.into()))];
        Self { values, tensors: Vec::new(), random: 0x2403_0957_2000_0001 }
    }

    fn set(&mut self, key: &str, value: Value) {
        self.values.push((key.to_owned(), value));
    }

    /// Random numbers, evenly between -0.25 and 0.25.
    fn weights(&mut self, name: &str, shape: &[u64]) {
        let count = shape.iter().product::<u64>();
        let mut next = || {
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            f32::from(u16::try_from(self.random >> 48).unwrap_or_default()) / 131_072.0 - 0.25
        };
        let data = (0..count).map(|_| next()).collect();
        self.tensors.push((name.to_owned(), shape.to_vec(), data));
    }

    fn linear(&mut self, name: &str, from: u64, to: u64) {
        self.weights(&format!("{name}.weight"), &[from, to]);
        self.weights(&format!("{name}.bias"), &[to]);
    }

    fn ones(&mut self, name: &str, count: u64) {
        self.tensors.push((name.to_owned(), vec![count], (0..count).map(|_| 1.0).collect()));
    }

    fn norm(&mut self, name: &str) {
        self.ones(&format!("{name}.weight"), EMBEDDING);
        self.weights(&format!("{name}.bias"), &[EMBEDDING]);
    }

    fn write(&self, path: &Path) -> io::Result<()> {
        let mut head = b"GGUF".to_vec();
        head.extend(3_u32.to_le_bytes());
        head.extend((self.tensors.len() as u64).to_le_bytes());
        head.extend((self.values.len() as u64).to_le_bytes());
        for (key, value) in &self.values {
            text(&mut head, key);
            value.write(&mut head);
        }
        let mut offset = 0;
        for (name, shape, data) in &self.tensors {
            text(&mut head, name);
            head.extend(u32::try_from(shape.len()).unwrap_or_default().to_le_bytes());
            for side in shape {
                head.extend(side.to_le_bytes());
            }
            head.extend(0_u32.to_le_bytes());
            head.extend((offset as u64).to_le_bytes());
            offset += (data.len() * 4).next_multiple_of(32);
        }
        head.resize(head.len().next_multiple_of(32), 0);
        let mut file = BufWriter::new(File::create(path)?);
        file.write_all(&head)?;
        for (.., data) in &self.tensors {
            let mut bytes: Vec<u8> = data.iter().flat_map(|number| number.to_le_bytes()).collect();
            bytes.resize(bytes.len().next_multiple_of(32), 0);
            file.write_all(&bytes)?;
        }
        file.flush()
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl Value {
    fn write(&self, out: &mut Vec<u8>) {
        let mut kind = |kind: u32| out.extend(kind.to_le_bytes());
        match self {
            Self::U32(value) => {
                kind(4);
                out.extend(value.to_le_bytes());
            }
            Self::F32(value) => {
                kind(6);
                out.extend(value.to_le_bytes());
            }
            Self::Bool(value) => {
                kind(7);
                out.push(u8::from(*value));
            }
            Self::Text(value) => {
                kind(8);
                text(out, value);
            }
            Self::Texts(values) => array(out, 8, values, |out, value| text(out, value)),
            Self::I32s(values) => {
                array(out, 5, values, |out, value| out.extend(value.to_le_bytes()));
            }
            Self::F32s(values) => {
                array(out, 6, values, |out, value| out.extend(value.to_le_bytes()));
            }
        }
    }
}

fn array<T>(out: &mut Vec<u8>, kind: u32, values: &[T], write: impl Fn(&mut Vec<u8>, &T)) {
    out.extend(9_u32.to_le_bytes());
    out.extend(kind.to_le_bytes());
    out.extend((values.len() as u64).to_le_bytes());
    for value in values {
        write(out, value);
    }
}
