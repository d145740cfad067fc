//! What `checkpoint` promises.

use super::*;
use proptest::prelude::*;
use serde_json::{Value, json};

/// A safetensors file with this header and these bytes after it.
fn file(header: &Value, data: &[u8]) -> Vec<u8> {
    let header = header.to_string();
    let length = (header.len() as u64).to_le_bytes();
    [&length, header.as_bytes(), data].concat()
}

/// A directory with one model file.
fn directory(bytes: &[u8]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("model.safetensors"), bytes).unwrap();
    directory
}

fn error(bytes: &[u8]) -> String {
    let directory = directory(bytes);
    Checkpoint::open(directory.path()).unwrap_err().to_string()
}

/// Whoever opened it would wait until somebody wrote to it.
#[test]
fn a_pipe_is_no_file_of_a_model() {
    let names = [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
    ];
    for name in names {
        let directory = tempfile::tempdir().unwrap();
        let pipe = directory.path().join(name);
        let made = std::process::Command::new("mkfifo").arg(&pipe).status();
        assert!(made.unwrap().success());
        let error = match name {
            "config.json" => ModelConfig::open(directory.path()).unwrap_err().to_string(),
            _ => Checkpoint::open(directory.path()).unwrap_err().to_string(),
        };
        assert!(
            error.contains(name) && error.contains("not a regular file"),
            "{error}"
        );
    }
}

/// A checkpoint with the tensor `t` of words that count up from 0.
fn counting(shape: &[usize]) -> (tempfile::TempDir, Checkpoint) {
    let count: usize = shape.iter().product();
    let data: Vec<u8> = (0..count as u32).flat_map(u32::to_le_bytes).collect();
    let header = json!({
        "t": {"dtype": "U32", "shape": shape, "data_offsets": [0, data.len()]}
    });
    let directory = directory(&file(&header, &data));
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    (directory, checkpoint)
}

/// What a slice of such a tensor must hold.
fn counted(shape: &[usize], ranges: &[Range<usize>]) -> Vec<u32> {
    let mut indices = vec![0];
    for (range, size) in ranges.iter().zip(shape) {
        let step = |index: usize| range.clone().map(move |i| index * size + i);
        indices = indices.into_iter().flat_map(step).collect();
    }
    indices.iter().map(|&index| index as u32).collect()
}

fn words(checkpoint: &Checkpoint, ranges: &[Range<usize>]) -> Vec<u32> {
    let array = checkpoint.read_words("t", ranges).unwrap();
    array.to_vec_exact().unwrap()
}

fn shape_and_ranges() -> impl Strategy<Value = (Vec<usize>, Vec<Range<usize>>)> {
    let axis = (1usize..9).prop_flat_map(|size| {
        (0..size).prop_flat_map(move |start| (Just(size), start + 1..=size, Just(start)))
    });
    prop::collection::vec(axis, 1..4).prop_map(|axes| {
        axes.into_iter()
            .map(|(size, end, start)| (size, start..end))
            .unzip()
    })
}

proptest! {
    #[test]
    fn any_slice_is_what_it_says((shape, ranges) in shape_and_ranges()) {
        let (_directory, checkpoint) = counting(&shape);
        prop_assert_eq!(words(&checkpoint, &ranges), counted(&shape, &ranges));
    }

    #[test]
    fn hostile_bytes_are_an_error(
        length in prop_oneof![any::<u64>(), 0u64..80],
        bytes in prop::collection::vec(any::<u8>(), 0..80),
    ) {
        let bytes = [&length.to_le_bytes()[..], &bytes].concat();
        let directory = directory(&bytes);
        let _ = Checkpoint::open(directory.path());
    }

    #[test]
    fn hostile_numbers_are_an_error(
        shape in prop::collection::vec(prop_oneof![any::<u64>(), 0u64..4], 0..4),
        offsets in any::<[u64; 2]>(),
        small in 0u64..40,
    ) {
        for offsets in [offsets, [0, small]] {
            let header = json!({"t": {"dtype": "U32", "shape": shape, "data_offsets": offsets}});
            let directory = directory(&file(&header, &[0; 16]));
            if let Ok(checkpoint) = Checkpoint::open(directory.path()) {
                let whole: Vec<_> = shape.iter().map(|&size| 0..size as usize).collect();
                let _ = checkpoint.read_words("t", &whole);
            }
        }
    }
}

#[test]
fn runs_longer_than_the_window_and_gaps_wider_than_a_page_are_read() {
    // 8 MB in rows of 32 KB.
    let shape = [256, 8192];
    let (_directory, checkpoint) = counting(&shape);
    // One run of 6 MB; near runs, more than one window of them; far runs.
    let cases = [[10..202, 0..8192], [0..256, 17..8001], [3..250, 5000..5003]];
    for ranges in cases {
        assert_eq!(words(&checkpoint, &ranges), counted(&shape, &ranges));
    }
}

#[test]
fn floats_come_in_the_precision_asked_for() {
    let values = [0.5f32, -3.0, 1e-3, 65504.0];
    let bytes = |value: &f32| bf16::from_f32(*value).to_le_bytes();
    let data: Vec<u8> = values.iter().flat_map(bytes).collect();
    let header = json!({"t": {"dtype": "BF16", "shape": [1, 4], "data_offsets": [0, 8]}});
    let directory = directory(&file(&header, &data));
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let read = |to| checkpoint.read_floats("t", &[0..1, 1..3], to).unwrap();
    let rounded = |value: f32| bf16::from_f32(value).to_f32();
    let wide = read(Precision::Float32).to_vec_exact::<f32>().unwrap();
    assert_eq!(wide, [-3.0, rounded(1e-3)]);
    let same = read(Precision::BFloat16).to_vec_exact::<bf16>().unwrap();
    assert_eq!(same, [bf16::from_f32(-3.0), bf16::from_f32(1e-3)]);
    assert_eq!(read(Precision::Float16).dtype(), mlx_rs::Dtype::Float16);
}

#[test]
fn errors_name_the_tensor_and_the_file() {
    let (_directory, checkpoint) = counting(&[2, 3]);
    let missing = checkpoint.expect_shape("lm_head.weight", &[1]).unwrap_err();
    assert!(missing.to_string().contains("lacks lm_head.weight"));
    let shape = checkpoint
        .expect_shape("t", &[3, 2])
        .unwrap_err()
        .to_string();
    assert!(
        shape.starts_with("t in /") && shape.contains("model.safetensors"),
        "{shape}"
    );
    assert!(
        shape.ends_with("has shape [2, 3], which should be [3, 2]"),
        "{shape}"
    );
    let read = |ranges: &[Range<usize>]| checkpoint.read_words("t", ranges).unwrap_err();
    assert!(read(&[0..3, 0..3]).to_string().contains("cannot be read"));
    assert!(
        read(&[0..2, 0..3, 0..1])
            .to_string()
            .contains("cannot be read")
    );
    let float = checkpoint
        .read_floats("t", &[0..2, 0..3], Precision::Float32)
        .unwrap_err();
    assert!(
        float
            .to_string()
            .contains("has type U32, which should be F32"),
        "{float}"
    );
}

#[test]
fn a_type_that_no_model_has_is_named() {
    let header = json!({"t": {"dtype": "I32", "shape": [4], "data_offsets": [0, 16]}});
    let directory = directory(&file(&header, &[0; 16]));
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let all = 0..4;
    let all = std::slice::from_ref(&all);
    for error in [
        checkpoint.read_floats("t", all, Precision::Float32),
        checkpoint.read_words("t", all),
    ] {
        let error = error.unwrap_err().to_string();
        assert!(error.contains("has type I32, which should be"), "{error}");
    }
}

#[test]
fn truncated_files_are_named() {
    let header = json!({"t": {"dtype": "U32", "shape": [4], "data_offsets": [0, 16]}});
    let whole = file(&header, &[0; 16]);
    let cut = error(&whole[..whole.len() - 1]);
    assert!(cut.contains("is truncated: t ends at byte"), "{cut}");
    assert!(error(&whole[..20]).contains("a header of"));
    assert!(error(&whole[..3]).contains("3 bytes are no safetensors file"));
}

#[test]
fn a_file_that_shrinks_after_opening_is_an_error() {
    let (directory, checkpoint) = counting(&[4, 4]);
    let path = directory.path().join("model.safetensors");
    File::options()
        .write(true)
        .open(path)
        .unwrap()
        .set_len(90)
        .unwrap();
    let error = checkpoint.read_words("t", &[0..4, 0..4]).unwrap_err();
    assert!(
        error.to_string().starts_with("cannot read t from"),
        "{error}"
    );
}

#[test]
fn an_index_must_stay_in_its_directory_and_tell_the_truth() {
    let header = json!({"t": {"dtype": "U32", "shape": [1], "data_offsets": [0, 4]}});
    let directory = directory(&file(&header, &[1, 0, 0, 0]));
    let open = |map: Value| {
        let index = json!({"metadata": {}, "weight_map": map}).to_string();
        let path = directory.path().join("model.safetensors.index.json");
        std::fs::write(path, index).unwrap();
        Checkpoint::open(directory.path())
    };
    assert!(open(json!({"t": "model.safetensors"})).is_ok());
    for file in ["../model.safetensors", "/etc/passwd", "..", ""] {
        let error = open(json!({"t": file})).unwrap_err().to_string();
        assert!(error.contains("is not a plain file name"), "{error}");
    }
    let error = open(json!({"u": "model.safetensors"}))
        .unwrap_err()
        .to_string();
    assert!(error.contains("the index places u in"), "{error}");
    assert!(
        open(json!({"t": "absent.safetensors"}))
            .unwrap_err()
            .to_string()
            .contains("absent")
    );
}

#[test]
fn original_checkpoints_are_to_be_converted() {
    for name in [
        "model.layers.0.block_sparse_moe.experts.0.w1.weight",
        "model.layers.0.mlp.experts.0.gate_proj.weight",
        "model.layers.0.self_attn.q_proj.weight_scale_inv",
    ] {
        let header = json!({name: {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}});
        assert!(
            error(&file(&header, &[0; 4])).contains("mlx_lm.convert"),
            "{name}"
        );
    }
}

#[test]
fn a_directory_without_a_model_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let error = Checkpoint::open(directory.path()).unwrap_err().to_string();
    assert!(
        error.contains("has neither model.safetensors nor"),
        "{error}"
    );
}
