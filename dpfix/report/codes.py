"""The numbers of findings, each with its meaning: those of checks, of advice and of refusals given in words.

The numbers of rules stand in :data:`dpfix.rules.RULES`, which takes none that stands here. ``docs/codes.md`` lists both.
"""

from __future__ import annotations

from collections.abc import Mapping

CODES: Mapping[str, str] = {
    # what a run of the training step shows
    "DPF012": "what the training step writes depends on the samples and would leave without noise",
    "DPF013": "the model lets one sample's output depend on another sample",
    "DPF014": "one sample's share of the loss depends on another sample",
    "DPF015": "the loss is a sum over the samples where a mean was announced, or the other way round",
    "DPF016": "no engine reproduces the batch-of-one reference",
    "DPF017": "trainable parameters that no gradient reaches were frozen for the private training",
    "DPF018": "Opacus's `ModuleValidator` refuses a layer that no rule has answered",
    "DPF020": "the loop's loss is not known beforehand; it is checked on real steps only",
    "DPF021": "forward writes state that does not depend on a sample",
    "DPF022": "the loader draws with replacement; Poisson sampling takes its place",
    "DPF023": "forward overwrites the output of a layer",
    "DPF024": "a sample enters the model as several rows; they count as one sample",
    "DPF025": "forward keeps something of a batch in an attribute until its next call; it is put back after every step",
    "DPF026": "no gradient comes back to a module call (a `detach` behind it); it runs without a graph",
    "DPF030": "an activation is applied to the probabilities that another one has made",
    "DPF031": "the loader draws by itself; every step is accounted as if every sample were in it",
    "DPF033": "the model was trained privately before on the same data; its epsilon goes on",
    "DPF034": "the loss, or the model, takes what the loop has kept of an earlier batch",
    "DPF035": "what is about to be released does not hold the noise that the accountant counts",
    "DPF036": "noise that was released before, or that two parameters share, is about to be released",
    "DPF039": "a checkpoint cannot be read, or holds what no training has saved",
    "DPF040": "there is no checkpoint of that name",
    "DPF041": "training_step, collate_fn or the loop mixes the samples before the model is called",
    "DPF042": "a hook on a module mixes the samples of a batch",
    "DPF043": "how the loop calls the model cannot be told from one batch; the first real call decides the engine",
    "DPF044": "a Trainer divides its loss by the number of tokens of the whole batch; it is averaged per sample",
    "DPF046": "collate_fn makes one sample's part of a batch of other samples",
    "DPF047": "`dpfix check`: one record moves the clipped sum of a real step further than is accounted for",
    "DPF048": "`dpfix check`: what the check cannot vouch for (a warning of the run, an optimizer beside the private one)",
    "DPF049": "collate_fn puts the items of persons into an order of its own",
    "DPF050": "the data set shows persons with several items, and privacy is accounted for one item",
    "DPF051": "a certificate does not fit: its seal, what it says twice, or the epsilon of its releases",
    "DPF052": "the budget of the data does not allow a release, or its file cannot be used",
    "DPF053": "a model that `fully_shard` has spread over processes cannot be trained as it is spread",
    # refusals given in words, by class of error
    "DPF100": "a refusal of no narrower class",
    "DPF101": "a value of the call cannot be used",
    "DPF102": "a keyword that does not exist",
    "DPF103": "the model cannot be made private as it is",
    "DPF104": "the loss is not a mean (or sum) over samples",
    "DPF105": "optimizer and model do not belong together",
    "DPF106": "the data loader cannot be sampled as the accountant assumes",
    "DPF107": "probabilities, labels or regions do not fit together",
    "DPF108": "how a batch becomes a loss is unknown, or that step itself fails",
    "DPF109": "one of several processes cannot train, or does not train the same",
    "DPF110": "a checkpoint does not fit the model",
    "DPF111": "the checkpoint has keys that the model has no place for",
    "DPF112": "the checkpoint lacks weights of the model",
    "DPF113": "a weight of the checkpoint has another shape",
    "DPF114": "the model cannot compute what the checkpoint's model computed",
    "DPF120": "the training loop breaks an assumption",
    "DPF121": "several backward passes before one step",
    "DPF122": "a batch that the private loader did not draw",
    "DPF123": "the clipped sum is not finite",
    "DPF124": "model or optimizer are no longer those that were audited",
}
"""What a code means, for all that are not a rule's."""

RETIRED: Mapping[str, str] = {
    "DPF000": "a refusal without a code of its own, in the time when not every class of error had one",
}
"""Codes that were given once; they are never given again."""
