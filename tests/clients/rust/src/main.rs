//! client JOB RESULT: one model in the `ort` crate, from its path. The library of onnxruntime
//! is the one that ORT_DYLIB_PATH names.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::{env, fs};

use ort::session::Session;
use ort::value::{DynValue, PrimitiveTensorElementType, Tensor};
use serde_json::{json, Value};

type Fallible<T> = Result<T, Box<dyn Error>>;

fn text<'a>(entry: &'a Value, key: &str) -> Fallible<&'a str> {
    entry[key].as_str().ok_or_else(|| format!("{key} is missing").into())
}

fn list<'a>(entry: &'a Value, key: &str) -> Fallible<&'a Vec<Value>> {
    entry[key].as_array().ok_or_else(|| format!("{key} is missing").into())
}

fn decoded<T, const N: usize>(bytes: &[u8], decode: fn([u8; N]) -> T) -> Vec<T> {
    let items = bytes.chunks_exact(N);
    items.map(|item| decode(item.try_into().expect("N bytes"))).collect()
}

fn encoded<T: PrimitiveTensorElementType + Copy, const N: usize>(
    value: &DynValue,
    encode: fn(T) -> [u8; N],
) -> ort::Result<Vec<u8>> {
    let (_, items) = value.try_extract_tensor::<T>()?;
    Ok(items.iter().flat_map(|item| encode(*item)).collect())
}

fn tensor(folder: &Path, entry: &Value) -> Fallible<DynValue> {
    let bytes = fs::read(folder.join(text(entry, "file")?))?;
    let dims: Vec<i64> = list(entry, "dims")?.iter().filter_map(Value::as_i64).collect();
    Ok(match text(entry, "type")? {
        "bool" => Tensor::from_array((dims, decoded(&bytes, |[b]| b != 0)))?.into_dyn(),
        "float32" => Tensor::from_array((dims, decoded(&bytes, f32::from_le_bytes)))?.into_dyn(),
        "float64" => Tensor::from_array((dims, decoded(&bytes, f64::from_le_bytes)))?.into_dyn(),
        "int32" => Tensor::from_array((dims, decoded(&bytes, i32::from_le_bytes)))?.into_dyn(),
        "int64" => Tensor::from_array((dims, decoded(&bytes, i64::from_le_bytes)))?.into_dyn(),
        other => return Err(format!("no inputs of type {other}").into()),
    })
}

fn stored(target: &Path, file: String, name: &str, value: &DynValue) -> Fallible<Value> {
    use ort::value::TensorElementType as Type;
    let dtype = value.dtype();
    let (kind, bytes) = match dtype.tensor_type() {
        Some(Type::Bool) => ("bool", encoded(value, |b: bool| [u8::from(b)])?),
        Some(Type::Float32) => ("float32", encoded(value, f32::to_le_bytes)?),
        Some(Type::Float64) => ("float64", encoded(value, f64::to_le_bytes)?),
        Some(Type::Int32) => ("int32", encoded(value, i32::to_le_bytes)?),
        Some(Type::Int64) => ("int64", encoded(value, i64::to_le_bytes)?),
        _ => return Err(format!("output {name} is {dtype}").into()),
    };
    fs::write(target.join(&file), bytes)?;
    let dims: Vec<i64> = value.shape().iter().copied().collect();
    Ok(json!({"name": name, "type": kind, "dims": dims, "file": file}))
}

fn load(path: &Path) -> ort::Result<Session> {
    let environment = ort::init().with_telemetry(false).build()?;
    Session::builder(&environment)?.with_intra_threads(1)?.commit_from_file(path)
}

fn run(session: &mut Session, job: &Value, folder: &Path, target: &Path) -> Fallible<Vec<Value>> {
    let mut outputs = Vec::new();
    for (number, sample) in list(job, "samples")?.iter().enumerate() {
        let mut feeds = Vec::new();
        for entry in sample.as_array().into_iter().flatten() {
            feeds.push((text(entry, "name")?.to_owned(), tensor(folder, entry)?));
        }
        let mut entries = Vec::new();
        for (index, (name, value)) in session.run(feeds)?.into_iter().enumerate() {
            entries.push(stored(target, format!("{number}-{index}.bin"), name, &value)?);
        }
        outputs.push(Value::from(entries));
    }
    Ok(outputs)
}

fn main() -> Fallible<()> {
    let mut arguments = env::args_os().skip(1).map(PathBuf::from);
    let (folder, target) = match (arguments.next(), arguments.next()) {
        (Some(folder), Some(target)) => (folder, target),
        _ => return Err("client JOB RESULT".into()),
    };
    let job: Value = serde_json::from_slice(&fs::read(folder.join("job.json"))?)?;
    let result = match load(&folder.join(text(&job, "model")?)) {
        Err(error) => json!({"status": "does not load", "reason": error.to_string()}),
        Ok(mut session) => match run(&mut session, &job, &folder, &target) {
            Err(error) => json!({"status": "does not run", "reason": error.to_string()}),
            Ok(outputs) => json!({"status": "", "reason": "", "outputs": outputs}),
        },
    };
    Ok(fs::write(target.join("result.json"), result.to_string())?)
}
