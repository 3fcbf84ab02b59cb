"""What an expert is, where it lives and how it computes; the lowest of the four packages.

    config.py      the architecture of a model, from config.json
    checkpoint.py  open a safetensors folder: tensors by name as views of the mapped files
    files.py       JSON and safetensors headers of files that nobody vouches for
    errors.py      CheckpointError
    linear.py      a weight (float32, bfloat16, block-quantised fp8) and its product
    weights.py     checkpoint names to the tensors of an expert
    channel/       frames and what carries them: in process, unix socket, TCP
    messages.py    control messages       directory.py  membership and epochs
    placement.py   which worker holds which expert: pure
    worker.py      computes the experts it holds       client.py  how others call it
    kernels/       compiled loops, each beside its torch twin

Glossary: *logical expert* = (layer, expert number); *physical expert* = a slot of a worker that
holds its weights; *redundant* = beyond the first; *epoch* = version of the table of who holds what.
"""
