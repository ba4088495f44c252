"""Models and losses in which one sample feels another are refused by name; their uncoupled relatives are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss, DiceLoss
from monai.networks.nets import Classifier
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, default_collate

import dpfix
from tests.reference import Step


def vectors(count: int = 12) -> list[tuple[Tensor, int]]:
    """Samples ``(x, y)`` of six features and three classes."""
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(6, generator=draw), i % 3) for i in range(count)]


def patches(*, empty: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Images with binary masks; none of the masks is empty unless asked for."""
    draw = torch.Generator().manual_seed(0)
    items = []
    for i in range(8):
        mask = (torch.rand(1, 6, 6, generator=draw) < 0.1 + 0.1 * (i % 4)).float()
        mask[..., 0, 0] = 1
        items.append((torch.randn(2, 6, 6, generator=draw), mask * (not empty or i != 0)))
    return items


def make(
    model: nn.Module,
    step: Step | None = None,
    criterion: Any = None,
    items: list[Any] | None = None,
    **options: Any,
) -> dpfix.PrivateTraining:
    """The call."""
    collate = options.pop("collate", default_collate)
    loader: Any = DataLoader(vectors() if items is None else items, batch_size=4, collate_fn=collate)  # type: ignore[arg-type]
    if step is None and criterion is None:
        criterion = nn.CrossEntropyLoss()
    return dpfix.make_private_safe(
        module=model.train(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        training_step=step,
        criterion=criterion,
        **options,
    )


def refusal(error: type[dpfix.DPFixError], *args: Any, **options: Any) -> str:
    """The message with which a call is refused; the model is afterwards as before."""
    before = {n: t.clone() for n, t in args[0].state_dict().items()}
    with pytest.raises(error) as caught:
        make(*args, **options)
    assert type(caught.value) is error
    after = args[0].state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    return str(caught.value)


# ------------------------------------------------------------------ coupled models


class Body(nn.Module):
    """A culprit in the middle of a model."""

    def __init__(self, culprit: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.stem, self.culprit, self.head = nn.Linear(6, 8), culprit, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.culprit(torch.tanh(self.stem(x)))))


class MeanSubtracted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class FunctionalNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)


class ChannelNorm(nn.Module):
    """Batch normalisation of images: a single sample has statistics too."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (2, 4))
        return F.batch_norm(x, None, None, training=True).flatten(1)


class HandWrittenNorm(nn.Module):
    """The same without a function of torch that says so."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (2, 4))
        var, mean = torch.var_mean(x, (0, 2), correction=0, keepdim=True)
        return ((x - mean) / (var + 1e-5).sqrt()).flatten(1)


class MinibatchStd(nn.Module):
    """One more feature: how much the samples of the batch differ (StyleGAN)."""

    def forward(self, x: Tensor) -> Tensor:
        spread = x.var(0, correction=0).add(1e-8).sqrt().mean()
        return torch.cat([x, spread.expand(len(x), 1)], 1)


class BatchAttention(nn.Module):
    """Attends over the samples instead of the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.t() / 3, 1) @ x


class BatchedTokens(nn.Module):
    """Self-attention that forgot ``batch_first``."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.unflatten(1, (2, 4))
        return (tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]).flatten(1)


class SortedBatch(nn.Module):
    """Subtracts from every sample the next larger one."""

    def forward(self, x: Tensor) -> Tensor:
        return x - torch.gather(x, 0, x.argsort(0)).roll(1, 0)


class MixUp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.7 * x + 0.3 * x.flip(0)


class NormInDisguise(nn.BatchNorm1d):
    """A BatchNorm without anything that its class promises."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


COUPLED = {
    "batch mean subtracted": (MeanSubtracted, 8),
    "batch norm by hand": (HandWrittenNorm, 8),
    "minibatch standard deviation": (MinibatchStd, 9),
    "attention over the batch": (BatchAttention, 8),
    "attention without batch_first": (BatchedTokens, 8),
    "sorted over the batch": (SortedBatch, 8),
    "mixed up": (MixUp, 8),
}


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_model_is_refused_by_name(name: str) -> None:
    culprit, width = COUPLED[name]
    message = refusal(dpfix.CoupledModelError, Body(culprit(), width))
    assert "`culprit" in message and "mixes the samples of a batch" in message
    assert culprit.__name__ in message


class Mixed(nn.Linear):
    """A sparse matrix of all rows times the rows, as graph networks have it."""

    def forward(self, adjacency: Tensor, x: Tensor) -> Tensor:
        return torch.sparse.mm(adjacency, super().forward(x))


class Graphs(nn.Module):
    """A graph of two nodes from every sample, in one sparse matrix; another edge would go from one sample to the next."""

    def __init__(self, *, coupled: bool = False) -> None:
        super().__init__()
        self.nodes, self.coupled = Mixed(3, 3), coupled

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 3)
        adjacency = torch.eye(len(rows))
        adjacency[0, -1] = float(self.coupled)
        return self.nodes(adjacency.to_sparse(), rows).view(len(x), 2, 3).mean(1)


class Counts(nn.Module):
    """Words of every sample in two rows of a sparse matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Parameter(torch.randn(3, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        counts = x.reshape(-1, 3).relu().to_sparse()
        return self.head(torch.sparse.mm(counts, self.words).view(len(x), 2, 4).mean(1))


def test_sparse_matrices_inside_a_model() -> None:
    for model in (Graphs(), Counts()):
        make(model)
    assert "Mixed at `nodes`" in refusal(dpfix.CoupledModelError, Graphs(coupled=True))


@pytest.mark.parametrize("culprit", [FunctionalNorm, ChannelNorm, lambda: NormInDisguise(8)])
def test_batch_norm_that_says_so_is_repaired(culprit: Callable[[], nn.Module]) -> None:
    """Functional, or in a forward of its own."""
    training = make(Body(culprit(), 8))
    assert [f.path for f in training.report.repairs if f.code == "DPF001"] == ["culprit"]


def test_coupling_in_the_root_names_the_root() -> None:
    class Centred(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return out - out.mean(0)

    assert "Centred (the root module" in refusal(dpfix.CoupledModelError, Centred(6, 3))


def test_coupling_in_the_step_between_model_and_loss_is_refused() -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        out = model(batch[0])
        return F.cross_entropy(out - out.mean(0), batch[1])

    assert "training_step as given" in refusal(dpfix.CoupledLossError, nn.Linear(6, 3), step)


# ------------------------------------------------------------------ state


class Average(nn.Module):
    """An exponential moving average of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.average.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return x


class Codebook(nn.Module):
    """A VQ-VAE codebook that follows its members."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x.detach(), self.codes).argmin(1)
        with torch.no_grad():
            self.codes[nearest] += 0.1 * (x - self.codes[nearest])
        return x + (self.codes[nearest] - x).detach()


class ActNorm(nn.Module):
    """Initialises its scale from the first batch (Glow)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.ready = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.scale.data.copy_(1 / (x.detach().square().mean(0).sqrt() + 0.1))
            self.ready = True
        return x * self.scale


class Cache(nn.Module):
    """Keeps the first activations for a plot."""

    first: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.first is None:
            self.first = x.detach()
        return x


class ListCache(nn.Module):
    """Keeps activations in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().mean())
        return x


class Statistic(nn.Module):
    """Keeps a number that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.largest = max(self.largest, float(x.detach().abs().max()))
        return x


@pytest.mark.parametrize(
    ("culprit", "name"),
    [
        (Average, "average"),
        (Codebook, "codes"),
        (ActNorm, "scale"),
        (Cache, "first"),
        (ListCache, "seen"),
        (Statistic, "largest"),
    ],
)
def test_state_written_from_samples_is_refused_by_name(culprit: type[nn.Module], name: str) -> None:
    message = refusal(dpfix.StateWrittenError, Body(culprit()))
    assert f"`culprit.{name}`" in message and culprit.__name__ in message


def test_embedding_that_renormalises_its_weight_is_refused_or_repaired() -> None:
    """``max_norm`` rewrites the rows that were looked up, without noise: it tells who was in the batch."""
    items = [(torch.tensor([i % 5, (2 * i) % 7]), i % 3) for i in range(12)]
    model = nn.Sequential(nn.Embedding(7, 4, max_norm=0.5), nn.Flatten(), nn.Linear(8, 3))
    try:
        training = make(model, items=items)
    except dpfix.ModelError as error:
        assert "max_norm" in str(error) or "`0.weight`" in str(error)
    else:
        assert model[0].max_norm is None and "max_norm" in training.report.details()


def test_counter_is_no_leak() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            self.calls += 1
            return x

    report = make(Body(Counted())).report
    assert any(f.code == "DPF021" for f in report.findings)


# ------------------------------------------------------------------ coupled losses


def segmenter(classes: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, classes, 1))


def info_nce(model: nn.Module, batch: Any) -> Tensor:
    """Every sample and its noisy twin against all others."""
    a, b = F.normalize(model(batch[0]), dim=1), F.normalize(model(batch[0] * 1.1 + 0.1), dim=1)
    return F.cross_entropy(a @ b.t() / 0.5, torch.arange(len(a)))


def worst_third(model: nn.Module, batch: Any) -> Tensor:
    """The mean of the largest losses of the batch (TopK)."""
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return losses.topk(max(1, len(losses) // 2)).values.mean()


def variance_kept(model: nn.Module, batch: Any) -> Tensor:
    """The variance term of VICReg."""
    out = model(batch[0])
    return F.relu(1 - out.var(0, correction=0).add(1e-4).sqrt()).mean() + F.cross_entropy(out, batch[1])


def tokens() -> list[tuple[Tensor, Tensor]]:
    """Sequences with targets, some of them padding."""
    draw = torch.Generator().manual_seed(0)
    items = []
    for i in range(8):
        y = torch.randint(0, 3, (5,), generator=draw)
        y[1 + i % 4 :] = -100
        items.append((torch.randn(5, 6, generator=draw), y))
    return items


def token_step(loss: Callable[..., Tensor]) -> Step:
    return lambda model, batch: loss(model(batch[0]).transpose(1, 2), batch[1])


def weighted() -> nn.CrossEntropyLoss:
    return nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 5.0]))


def test_weighted_mean_is_refused_by_name() -> None:
    message = refusal(dpfix.CoupledLossError, nn.Linear(6, 3), criterion=weighted())
    assert "CrossEntropyLoss(weight=..., reduction='mean')" in message
    assert "dpfix.PerSampleLoss(criterion)" in message


def test_weighted_mean_inside_a_training_step_is_named_too() -> None:
    loss = weighted()

    def step(model: nn.Module, batch: Any) -> Tensor:
        return loss(model(batch[0]), batch[1])

    assert "CrossEntropyLoss(weight=..., reduction='mean')" in refusal(dpfix.CoupledLossError, nn.Linear(6, 3), step)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), F.cross_entropy], ids=("module", "function"))
def test_mean_over_valid_tokens_is_refused_by_name(loss: Any) -> None:
    assert "ignore_index" in refusal(dpfix.CoupledLossError, nn.Linear(6, 3), token_step(loss), items=tokens())


def test_another_ignore_index_is_named() -> None:
    items = [(x, y.where(y >= 0, torch.tensor(2))) for x, y in tokens()]
    step = token_step(nn.CrossEntropyLoss(ignore_index=2))
    message = refusal(dpfix.CoupledLossError, nn.Linear(6, 3), step, items=items)
    assert "ignore_index=2" in message


def test_batch_dice_is_refused_by_name() -> None:
    message = refusal(
        dpfix.CoupledLossError, segmenter(), criterion=DiceLoss(sigmoid=True, batch=True), items=patches(empty=True)
    )
    assert "DiceLoss(batch=True)" in message


def test_batch_dice_inside_another_loss_is_named() -> None:
    loss = DiceCELoss(sigmoid=True, batch=True)
    message = refusal(dpfix.CoupledLossError, segmenter(), criterion=loss, items=patches())
    assert "batch=True" in message


@pytest.mark.parametrize("step", [info_nce, worst_third, variance_kept])
def test_losses_over_the_batch_are_refused(step: Step) -> None:
    message = refusal(dpfix.CoupledLossError, nn.Linear(6, 3), step)
    assert "not the mean of the losses of its samples" in message
    assert "`weight`" in message or "`bias`" in message


def test_top_k_is_named_by_its_class() -> None:
    class TopKLoss(nn.CrossEntropyLoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            losses = F.cross_entropy(input, target, reduction="none")
            return losses.topk(max(1, len(losses) // 2)).values.mean()

    message = refusal(dpfix.CoupledLossError, nn.Linear(6, 3), criterion=TopKLoss())
    assert "TopKLoss keeps the worst elements of the whole batch" in message


@pytest.mark.parametrize(("loss", "announced"), [("sum", "mean"), ("mean", "sum")])
def test_other_reduction_is_told_apart_from_a_coupling(loss: str, announced: str) -> None:
    criterion = nn.CrossEntropyLoss(reduction=loss)
    message = refusal(dpfix.LossError, nn.Linear(6, 3), criterion=criterion, loss_reduction=announced)
    assert f"is a {loss} over the samples" in message and f"loss_reduction='{loss}'" in message
    make(nn.Linear(6, 3), criterion=criterion, loss_reduction=loss)


# ------------------------------------------------------------------ coupled only for some data


class IfEmpty(nn.Module):
    """Uses a statistic of the batch only if a sample is empty."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0) if bool((x == 0).flatten(1).all(1).any()) else x


class IfLarge(nn.Module):
    """Uses a statistic of the batch only if there is an outlier."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().max() if bool((x.abs() > 10).any()) else x


class First(nn.Module):
    """The culprit sees the input."""

    def __init__(self, culprit: nn.Module) -> None:
        super().__init__()
        self.culprit, self.head = culprit, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.culprit(x))


@pytest.mark.parametrize("culprit", [IfEmpty, IfLarge])
def test_model_coupled_by_rare_samples_is_refused(culprit: type[nn.Module]) -> None:
    message = refusal(dpfix.CoupledModelError, First(culprit()))
    assert f"{culprit.__name__} at `culprit`" in message


def test_state_written_by_rare_samples_only_is_refused() -> None:
    class Clipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("limit", torch.tensor(10.0))

        def forward(self, x: Tensor) -> Tensor:
            largest = x.detach().abs().max()
            if bool(largest > self.limit):
                self.limit.copy_(largest)
            return x

    assert "`culprit.limit`" in refusal(dpfix.StateWrittenError, First(Clipped()))


def test_class_weights_show_although_all_labels_of_the_probe_are_equal() -> None:
    """The first four samples, from which the probe is taken, have one class; the others come later."""
    items = [(x, 0) for x, _ in vectors(4)] + vectors(12)
    message = refusal(dpfix.CoupledLossError, nn.Linear(6, 3), criterion=weighted(), items=items)
    assert "CrossEntropyLoss(weight=..., reduction='mean')" in message


def test_ignore_index_shows_although_the_probe_has_no_ignored_element() -> None:
    items = [(x, y.where(y >= 0, torch.tensor(1))) for x, y in tokens()[:4]] + tokens()
    step = token_step(nn.CrossEntropyLoss())
    assert "ignore_index" in refusal(dpfix.CoupledLossError, nn.Linear(6, 3), step, items=items)


def test_batch_dice_shows_although_no_mask_of_the_probe_is_empty() -> None:
    message = refusal(
        dpfix.CoupledLossError, segmenter(), criterion=DiceLoss(sigmoid=True, batch=True), items=patches()
    )
    assert "DiceLoss(batch=True)" in message


def test_padding_shows_although_the_first_samples_are_equally_long() -> None:
    class Mean(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean(1)

    draw = torch.Generator().manual_seed(0)
    items = [(torch.randn(3 + max(0, i - 3) % 3, 6, generator=draw), i % 3) for i in range(12)]
    message = refusal(dpfix.CoupledModelError, Mean(6, 3), items=items, collate=pad)
    assert "Mean (the root module" in message


def test_loss_coupled_by_empty_masks_only_is_refused() -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        """Averages over the patches that have a structure, as some recipes do."""
        losses = F.binary_cross_entropy_with_logits(model(batch[0]), batch[1], reduction="none").flatten(1).mean(1)
        there = batch[1].flatten(1).amax(1) > 0
        return (losses * there).sum() / there.sum().clamp(min=1)

    assert "not the mean" in refusal(dpfix.CoupledLossError, segmenter(), step, items=patches())


# ------------------------------------------------------------------ not refused

PER_SAMPLE: dict[str, Callable[[], dpfix.PrivateTraining]] = {
    "weighted mean": lambda: make(nn.Linear(6, 3), criterion=dpfix.PerSampleLoss(weighted())),
    "ignore_index": lambda: make(
        nn.Linear(6, 3), token_step(dpfix.PerSampleLoss(nn.CrossEntropyLoss())), items=tokens()
    ),
    "batch dice": lambda: make(
        segmenter(), criterion=dpfix.PerSampleLoss(DiceLoss(sigmoid=True, batch=True)), items=patches(empty=True)
    ),
    "reduction sum": lambda: make(nn.Linear(6, 3), criterion=dpfix.PerSampleLoss(nn.CrossEntropyLoss(reduction="sum"))),
}


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_coupled_loss_is_cured_by_per_sample_loss(name: str) -> None:
    training = PER_SAMPLE[name]()
    assert any(line.startswith("isolated: the gradient of the batch") for line in training.report.audit)


def test_plain_losses_are_accepted() -> None:
    make(nn.Linear(6, 3))
    make(nn.Linear(6, 3), criterion=nn.CrossEntropyLoss(label_smoothing=0.1))
    make(nn.Linear(6, 3), criterion=nn.CrossEntropyLoss(weight=torch.ones(3)))
    make(nn.Linear(6, 3), criterion=nn.MultiMarginLoss())


@pytest.mark.parametrize("empty", [False, True])
def test_dice_of_single_samples_is_accepted(empty: bool) -> None:
    make(segmenter(), criterion=DiceCELoss(sigmoid=True, batch=False), items=patches(empty=empty))


class VAE(nn.Module):
    """A small variational auto-encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, 1)
        z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        return self.decoder(z), mean, log_variance


def vae_step(model: nn.Module, batch: Any) -> Tensor:
    out, mean, log_variance = model(batch[0])
    kl = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1)
    return ((out - batch[0]).square().sum(1) + kl).mean()


def test_vae_with_a_loss_per_sample_is_accepted() -> None:
    make(VAE(), vae_step)


def test_vae_whose_kl_is_a_sum_is_refused() -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        out, mean, log_variance = model(batch[0])
        kl = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
        return F.mse_loss(out, batch[0]) + kl

    assert "not the mean" in refusal(dpfix.CoupledLossError, VAE(), step)


class Tokens(nn.Module):
    """Attention inside every sample, with dropout and a mask."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.2, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        there = (x.abs().sum(2, keepdim=True) > 0).to(x)
        out = self.encoder(x, src_key_padding_mask=there[..., 0] == 0)
        return self.head((out * there).sum(1) / there.sum(1).clamp(min=1))


def test_attention_inside_a_sample_is_accepted() -> None:
    draw = torch.Generator().manual_seed(0)
    make(Tokens(), items=[(torch.randn(4, 6, generator=draw), i % 3) for i in range(8)])


def pad(items: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Pads to the longest sequence of the batch."""
    return pad_sequence([x for x, _ in items], batch_first=True), torch.tensor([y for _, y in items])


def test_padding_to_the_longest_sequence_is_accepted_if_it_changes_nothing() -> None:
    draw = torch.Generator().manual_seed(0)
    items = [(torch.randn(2 + i % 3, 6, generator=draw), i % 3) for i in range(8)]
    make(Tokens(), items=items, collate=pad)


def test_padding_that_changes_the_output_is_refused() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x).mean(1)

    draw = torch.Generator().manual_seed(0)
    items = [(torch.randn(2 + i % 3, 6, generator=draw), i % 3) for i in range(8)]
    assert "Mean (the root module" in refusal(dpfix.CoupledModelError, Mean(), items=items, collate=pad)


@pytest.mark.parametrize("dropout", [nn.Dropout(0.5), nn.AlphaDropout(0.3), nn.FeatureAlphaDropout(0.3)])
def test_dropout_is_accepted(dropout: nn.Module) -> None:
    make(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), dropout, nn.Linear(8, 3)))


@pytest.mark.parametrize("dropout", [nn.Dropout2d(0.5), nn.Dropout(0.2)])
def test_dropout_of_channels_is_accepted(dropout: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), dropout, nn.Conv2d(4, 1, 1))
    make(model, criterion=nn.BCEWithLogitsLoss(), items=patches())


@pytest.mark.parametrize("replacement", [True, False])
def test_positions_drawn_for_every_sample_are_accepted(replacement: bool) -> None:
    class Masked(nn.Module):
        """Keeps some positions of every sample, drawn anew, as masked autoencoders do."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            kept = torch.multinomial(x[..., 0].abs() + 0.1, 2, replacement=replacement)
            x = x[torch.arange(len(x))[:, None], kept]
            return self.head(torch.tanh(self.stem(x)).mean(1))

    draw = torch.Generator().manual_seed(0)
    make(Masked(), items=[(torch.randn(4, 6, generator=draw), i % 3) for i in range(8)])


def test_noise_and_stochastic_depth_are_accepted() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x + 0.1 * torch.randn_like(x))
            keep = torch.rand(len(x), 1) > 0.3  # per sample
            return self.head(torch.tanh(x + keep * self.block(x)))

    make(Noisy())


def test_crossing_detach_and_two_calls_are_accepted() -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        a, b = model(batch[0]), model(batch[0].flip(1))
        return -F.cosine_similarity(a, b.detach()).mean()

    make(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), step)


# ------------------------------------------------------------------ a gradient that is zero but for rounding


class Whispering(Classifier):
    """Every output feels a little of the mean over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out + 1e-5 * out.mean(0)


@pytest.mark.parametrize("seed", [0, 11])
@pytest.mark.parametrize("kind", [Classifier, Whispering])
def test_rounding_of_a_constant_sample_behind_normalisations_is_none_of_coupling(
    kind: type[Classifier], seed: int
) -> None:
    """Of a sample of zeros the first bias has no gradient; what rounding makes of it is large, also in double precision."""
    torch.manual_seed(seed)
    model = kind((1, 16, 16), 2, (4, 8), (2, 2))
    items = [(x, i % 2) for i, x in enumerate(torch.randn(16, 1, 16, 16))]
    if kind is Whispering:
        with pytest.raises(dpfix.CoupledModelError, match="DPF013"):
            make(model, items=items)
    else:
        make(model, items=items)
