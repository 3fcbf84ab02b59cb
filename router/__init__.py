"""Which expert replica gets which token: gate, dispatch, combine and the retries between them.

    gate.py      logits -> expert ids and weights        dispatch.py  pairs -> frames by worker
    combine.py   frames back -> rows                      table.py     a snapshot as index arrays
    exchange.py  state between begin and finish           lane.py      one thread drives it
    compute.py   all that is computed with rows            device_compute.py  the same on a GPU
    local.py     every expert in this process, no hop
    worker.py    the router of a process                  batcher.py   merges what waits for it
    client.py    how attention calls a router             errors.py    what callers may catch
    weights.py   checkpoint names of the gates            config.py    times, sizes, switches
    compiled.py  kernels ready before the first token     kernels/     compiled loops
    outage.py    since when experts have no holder

pair: one (token row, logical expert) with its weight; a token has k of them.
lane: one thread with its own connections to the expert workers.
holder: an expert worker that has the weights of a logical expert in a slot.
"""
