"""What an expert is, where it lives and how it computes; the lowest of the four packages.

The model
    config.py      the architecture of a model, from config.json
    checkpoint.py  open a safetensors folder: tensors by name as views of the mapped files
    files.py       JSON and safetensors headers of files that nobody vouches for
    errors.py      CheckpointError
    weights.py     where a checkpoint keeps the routed experts
Computing
    device.py      where a process computes: chosen once, with the reason
    linear.py      a weight (float32, bfloat16, block-quantised fp8) and its product
    layer.py       gated MLPs over the slots of a worker      kernels/  compiled loops, GPU kernels
    worker.py      the slots, and what answers a frame        turns.py  who waits, joins the next
    compute.py     a worker's slots and sums, on the CPU; on a device:
    device_compute.py  the same      device_layer.py  its gated MLPs      staging.py  pinned copies
Who holds what
    placement/     which worker holds which expert: pure      load.py   rows an expert had lately
    directory/     tells everyone who lives and holds what    messages.py           what travels
    snapshots.py   the newest answer                          metrics.py  numbers told to others
Calling
    client.py      send to all workers, then gather           hop.py    one batch and its answer
    line.py        the connection to one of them              probe.py  does it compute again
    health.py      faults, times and open rows of workers
    channel/       frames and what carries them: in process, sockets, shared memory

Glossary: *logical expert* = (layer, expert number); *physical expert* = a slot of a worker that
holds its weights; *redundant* = beyond the first; *epoch* = version of the table of who holds what.
"""
