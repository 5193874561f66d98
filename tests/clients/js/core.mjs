// What the clients in JavaScript share: a job in, a result out. Reading, writing and how a
// session is made are theirs.

const ARRAYS = {
  bool: Uint8Array,
  float32: Float32Array,
  float64: Float64Array,
  int32: Int32Array,
  int64: BigInt64Array,
};

async function feeds(Tensor, sample, read) {
  const tensors = {};
  for (const { name, type, dims, file } of sample) {
    if (!(type in ARRAYS)) throw new Error(`input ${name} is ${type}`);
    tensors[name] = new Tensor(type, new ARRAYS[type](await read(file)), dims);
  }
  return tensors;
}

async function stored(session, found, number, write) {
  const entries = [];
  for (const [index, name] of session.outputNames.entries()) {
    const { type, dims, data } = found[name];
    if (!(type in ARRAYS)) throw new Error(`output ${name} is ${type}`);
    const file = `${number}-${index}.bin`;
    await write(file, new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
    entries.push({ name, type, dims, file });
  }
  return entries;
}

// `read` gives an ArrayBuffer of its own, `write` takes bytes; both name files of the job
// and of the result. The result is written last: it says that all else is there.
export async function work(job, { Tensor, open, read, write }) {
  const result = { status: 'does not load', reason: '', outputs: [] };
  try {
    const session = await open(job);
    result.status = 'does not run';
    for (const [number, sample] of job.samples.entries()) {
      const found = await session.run(await feeds(Tensor, sample, read));
      result.outputs.push(await stored(session, found, number, write));
    }
    result.status = '';
  } catch (error) {
    result.reason = String(error?.message ?? error);
  }
  await write('result.json', new TextEncoder().encode(JSON.stringify(result)));
}
