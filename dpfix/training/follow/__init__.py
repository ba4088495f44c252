"""The proof on real steps: samples are followed from the loader's delivery to ``optimizer.step()``.

::

    private loader ── delivers ──> what the script makes of it ──> model ──> loss ──> backward() ──> clip ──> noise
         │                                    │                      │        │          │            │
    delivery.py:                         follower.py:               hooks   follower   judge.py:    released.py:
    which entry of the batch      every torch function is written            again     nobody       the clipped
    carries the samples, and how  down, with its place in the script                   else's data  sum is the one
                                                                                       matters to   of batches of
                                                                                       sample i     one

A step is *checked* when ``agenda.py`` says so: the first steps, steps on which something is seen for the first time (a line of
the script, an edge of the model's graph, a factor that is not zero any more, a label, a missing value), and random later
ones within a share of the training time. In a checked step what the script did is repeated with the other samples exchanged,
by its own code if that was told (``told.py``) and else call by call (``replay.py``). For every sample that is looked at, its rows
in the model's arguments, in the model's outputs, and in the gradient of the loss with respect to the outputs have to stay as
they are. Together that is what clipping per sample rests on. Nothing is released in a step that fails.

Batches are looked at where they are made: a collate function that computes from all of a batch is stopped there, in a worker too
(``collation.py``); a loader of the script's own tells what it delivers as the private one does (``sampling/own_loader.py``).

What a check cannot see is named once, with its place; with ``strict=True`` it is refused. Python numbers that the script
reads from a batch and computes with are followed by value (``numbers.py``). What learns beside the model, or is kept from
one batch to the next, leaves without noise and is refused (``outside.py``, ``kept.py``); so is what reaches the model, or the
step, past the model's arguments: attributes, hooks, settings of the optimizer (``beside.py``).
"""
