"""Load one model and run it on sets of inputs; needs onnxruntime and numpy, nothing else.

    _ort_child.py [--plain] MODEL OUTPUTS.npz [INPUTS.npz ...]

Exit status 3 when the model does not load, 4 when it does not run; the reason is the last
line on stderr. With --plain the runtime optimizes nothing and prepacks no weights.
"""

import sys

import numpy as np
import onnxruntime as ort

LOAD_FAILED = 3
RUN_FAILED = 4


def session(path, plain):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    # From 1.31 on a constant of more than 1 GiB is folded only where nothing limits it.
    options.add_session_config_entry(
        "optimization.constant_folding_max_output_size_in_bytes", "0"
    )
    if plain:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def flat(name, value):
    """Arrays by name; sequences and maps become one entry for each element."""
    if isinstance(value, dict):
        value = [item for key in sorted(value) for item in (key, value[key])]
    if isinstance(value, (list, tuple)):
        found = {name: np.array(len(value))}
        for index, item in enumerate(value):
            found.update(flat(f"{name}.{index}", item))
        return found
    if value is None:
        return {name: np.array("none")}
    array = np.asarray(value)
    return {name: array.astype("U") if array.dtype == object else array}


def fail(status, error):
    sys.stderr.write("\n" + " ".join(str(error).split()) + "\n")
    sys.exit(status)


def main(arguments):
    plain = arguments[0] == "--plain"
    model, target, *sources = arguments[1:] if plain else arguments
    try:
        loaded = session(model, plain)
    except Exception as error:
        fail(LOAD_FAILED, error)
    found = {}
    for number, source in enumerate(sources):
        with np.load(source) as inputs:
            try:
                outputs = loaded.run(None, dict(inputs))
            except Exception as error:
                fail(RUN_FAILED, error)
        for index, output in enumerate(outputs):
            found.update(flat(f"{number}-{index}", output))
    np.savez(target, **found)


if __name__ == "__main__":
    main(sys.argv[1:])
