// node node.mjs path|bytes JOB RESULT: one model in onnxruntime-node, from its path or with
// the model and its data files handed over as bytes.

import { readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';

import ort from 'onnxruntime-node';

import { work } from './core.mjs';

const [, , mode, folder, target] = process.argv;
const bytes = (file) => readFile(join(folder, file));
const job = JSON.parse(await bytes('job.json'));

async function open({ model, data }) {
  if (mode === 'path') return ort.InferenceSession.create(join(folder, model));
  const externalData = await Promise.all(
    data.map(async (path) => ({ path, data: await bytes(path) })),
  );
  return ort.InferenceSession.create(await bytes(model), { externalData });
}

await work(job, {
  Tensor: ort.Tensor,
  open,
  read: async (file) => new Uint8Array(await bytes(file)).buffer,
  write: (file, content) => writeFile(join(target, file), content),
});
