"""The nested linear layer of a model in PyTorch, and the model of an artifact made of them."""

import contextlib
import copy
import dataclasses
import json

import torch
import transformers
from torch import nn
from torch.nn import functional as F

from consolidate.artifact import Artifact, ArtifactError, Layer, quantise_factor

DAMPING = 0.01  # of the inputs' second moment, as share of their mean energy


@dataclasses.dataclass
class Gathered:
    """Sums over rows of backward passes, for a term's start."""

    gradient: torch.Tensor  # by the weight [out, in]
    moment: torch.Tensor  # of the inputs [in, in]
    rows: int = 0

    def add(self, inputs: torch.Tensor, grads: torch.Tensor):
        inputs = inputs.float()
        self.gradient.addmm_(grads.float().T, inputs)
        self.moment.addmm_(inputs.T, inputs)
        self.rows += len(inputs)


class _DeltaLinear(torch.autograd.Function):
    """y = (W + U^T V) x with W frozen: one dense product forward and one back to x, and the thin
    ones for U [k, out] and V [k, in] alone. `weight` is the sum, [out, in]. `gathered` may be None.
    """

    @staticmethod
    def forward(ctx, x, weight, u, v, bias, gathered):
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, u, v = (tensor.to(dtype) for tensor in (x, weight, u, v))
        ctx.save_for_backward(x, weight, u, v)
        ctx.gathered = gathered
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight, u, v = ctx.saved_tensors
        rows, grads = x.flatten(0, -2), grad.flatten(0, -2)
        if ctx.gathered is not None:
            ctx.gathered.add(rows, grads)
        grad_u = (rows @ v.T).T @ grads
        grad_v = (grads @ u.T).T @ rows
        return grad @ weight, None, grad_u.float(), grad_v.float(), None, None


class NestedLinear(nn.Module):
    """y = P x + B (mask o A x) + U V x + bias at a form and a rank, which `set_level` chooses.

    `delta_a` [k, in] and `delta_bt` [k, out] are the shared low-rank term; they take the place of
    the last k of a prefix level's components, so that the level costs what it did. A layer that
    runs dense or residual has none.
    """

    def __init__(self, artifact: Artifact, layer: Layer, forms: set[str]):
        """The parts of a layer that runs `forms`."""
        super().__init__()
        self.layer = layer
        self.register_buffer("dense", artifact.dense(layer), persistent=False)
        if "residual" in forms:
            self.register_buffer("coarse", artifact.coarse(layer), persistent=False)
        if "middle" in forms:
            self.register_buffer("middle", artifact.middle(layer), persistent=False)
        for form in ("residual", "prefix"):
            a, bt = artifact.factors(layer, form)
            self.register_parameter(f"{form}_a", nn.Parameter(a, requires_grad=False))
            self.register_parameter(f"{form}_bt", nn.Parameter(bt, requires_grad=False))
        bias = artifact.bias(layer)
        self.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
        self.delta_a = None
        self.delta_bt = None
        self.form, self.rank = "dense", 0
        self._frozen = {}  # dense products of frozen factors, by rank
        self._weight = None  # of the level, delta included
        self._gathered = None
        self.composes = False  # whether a pass sees one matrix, whatever the form
        self._matrix = None  # that matrix, a leaf,
        self._composed = None  # and what it is made of, where that trains

    def add_delta(self, rank: int, generator: torch.Generator):
        """A term of `rank` components that is zero at first: random V, U = 0."""
        a = torch.randn(rank, self.layer.in_, generator=generator) / self.layer.in_**0.5
        self.delta_a = nn.Parameter(a.to(self.dense.device))
        self.delta_bt = nn.Parameter(torch.zeros(rank, self.layer.out, device=self.dense.device))

    def gather_gradients(self):
        """Lets backward passes add to the gradient by the layer's weight, and to the second moment
        of its inputs, until start_delta."""
        self._gathered = Gathered(
            torch.zeros_like(self.dense), self.dense.new_zeros(self.layer.in_, self.layer.in_)
        )

    @torch.no_grad()
    def start_delta(self):
        """Starts the term by what was gathered: Trainer.start_terms has the formula."""
        gathered, self._gathered = self._gathered, None
        if gathered.rows == 0:  # dense at every level that ran
            return
        moment = gathered.moment.double() / gathered.rows
        moment.diagonal().add_(DAMPING * moment.diagonal().mean() + 1e-30)
        lower = torch.linalg.cholesky(moment)
        white = torch.linalg.solve_triangular(lower, gathered.gradient.double().T, upper=False).T
        _, _, q = torch.svd_lowrank(white, q=self.delta_rank + 8, niter=3)
        v = torch.linalg.solve_triangular(lower.T, q[:, : self.delta_rank], upper=True).T
        weight = self.dense.double()
        output_energy = ((weight @ moment) * weight).sum() / self.layer.out
        self.delta_a.copy_(v * output_energy.sqrt())

    @property
    def delta_rank(self) -> int:
        return 0 if self.delta_a is None else self.delta_a.shape[0]

    def set_level(self, form: str, rank: int):
        """Sums up what is frozen: to be called again after a step of the optimiser. Passes of
        several threads may then share the layer."""
        self.form, self.rank = form, rank
        if self.composes:
            self._compose()
        elif self._runs_delta:
            with torch.no_grad():
                product = self._product(rank - self.delta_rank)
                if self._weight is None:
                    self._weight = torch.empty_like(product)
                torch.addmm(product, self.delta_bt.T, self.delta_a, out=self._weight)

    def _compose(self):
        if self.form in ("dense", "middle"):
            matrix = getattr(self, self.form)
        elif self._runs_delta:
            product = self._product(self.rank - self.delta_rank)
            matrix = torch.addmm(product, self.delta_bt.T, self.delta_a)
        else:
            a, bt = self._level_factors()
            matrix = bt.T @ a
            if self.form == "residual":
                matrix = matrix + self.coarse
        self._composed = matrix if matrix.requires_grad else None
        # A leaf that wants its gradient even where nothing trains: every layer then looks alike to
        # what is compiled.
        self._matrix = matrix.detach().requires_grad_()

    def take_gradient(self):
        """What the level's matrix is made of and the gradient that passes left by the matrix; None
        where nothing trains."""
        if self._composed is None or self._matrix.grad is None:
            return None
        pair = (self._composed, self._matrix.grad)
        self._composed = None
        return pair

    @property
    def _runs_delta(self) -> bool:
        return self.form == "prefix" and self.delta_rank > 0

    def _product(self, rank: int) -> torch.Tensor:
        """B_r A_r [out, in] of frozen prefix factors."""
        if rank not in self._frozen:
            with torch.no_grad():
                self._frozen[rank] = self.prefix_bt[:rank].T @ self.prefix_a[:rank]
        return self._frozen[rank]

    def _level_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        a, bt = getattr(self, f"{self.form}_a"), getattr(self, f"{self.form}_bt")
        return a[: self.rank], bt[: self.rank]

    def forward(self, x):
        if self.composes:
            return F.linear(x, self._matrix, self.bias)
        if self.form in ("dense", "middle"):
            return F.linear(x, getattr(self, self.form), self.bias)
        if self._runs_delta:
            return _DeltaLinear.apply(
                x, self._weight, self.delta_bt, self.delta_a, self.bias, self._gathered
            )
        a, bt = self._level_factors()
        # Many rows through two thin products may cost more than making the matrix that they are.
        rows, (out, in_) = x.numel() // x.shape[-1], self.dense.shape
        if (rows + self.rank) * out * in_ < rows * self.rank * (out + in_):
            y = F.linear(x, bt.T @ a)
        else:
            y = F.linear(x, a) @ bt
        if self.form == "residual":
            y = y + F.linear(x, self.coarse)
        return y if self.bias is None else y + self.bias

    def factor_tensors(self) -> dict[str, torch.Tensor]:
        """The factors as an artifact stores them, by tensor name."""
        tensors = {}
        for form in ("residual", "prefix"):
            for part in ("a", "bt"):
                values = getattr(self, f"{form}_{part}")
                if len(values) > 0:
                    stem = f"{self.layer.name}.{form}.{part}"
                    tensors[stem], tensors[f"{stem}_scales"] = quantise_factor(values)
        return tensors


class NestedModel(nn.Module):
    """The model of an artifact with every nested layer in place. `hidden` and `head` together are
    a language model; an encoder has no head. `set_level` takes an index of artifact.levels."""

    def __init__(self, artifact: Artifact):
        super().__init__()
        self.artifact = artifact
        config = transformers.AutoConfig.from_pretrained(artifact.directory)
        self.is_encoder = artifact.is_encoder
        if self.is_encoder:
            self.model = transformers.AutoModel.from_config(
                config, dtype=torch.float32, add_pooling_layer=False
            )
        else:
            self.model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self.model.eval()
        self.model.requires_grad_(False)
        self._load_others()
        forms = zip(*(level.forms for level in artifact.levels))
        self.nested = nn.ModuleList(
            self._replace(layer, set(own)) for layer, own in zip(artifact.layers, forms)
        )
        artifact.tensors.clear()  # they are parameters now

    def _load_others(self):
        own = dict(self.model.named_parameters())
        for name, tensor in self.artifact.others().items():
            if name not in own:
                raise ArtifactError(
                    f"{self.artifact.directory}/nested.safetensors: tensor {name} is not in "
                    f"{type(self.model).__name__}"
                )
            own[name].data.copy_(tensor.float())

    def _replace(self, layer: Layer, forms: set[str]) -> NestedLinear:
        nested = NestedLinear(self.artifact, layer, forms)
        name = layer.name
        embeddings = self.model.get_input_embeddings()
        try:
            old = self.model.get_submodule(name)
        except AttributeError:
            raise ArtifactError(
                f"{self.artifact.directory}/nested.json: layer {name} is no module of "
                f"{type(self.model).__name__}"
            ) from None
        if old is embeddings:  # a tied head
            embeddings.weight = nn.Parameter(nested.dense, requires_grad=False)
            self.model.set_output_embeddings(nested)
            return nested
        if not isinstance(old, nn.Linear) or tuple(old.weight.shape) != (layer.out, layer.in_):
            raise ArtifactError(
                f"{self.artifact.directory}/nested.json: layer {name}: {old} is no linear layer "
                f"[{layer.out}, {layer.in_}]"
            )
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, nested)
        return nested

    @property
    def head(self) -> NestedLinear:
        return self.nested[-1]

    @property
    def full_level(self) -> int:
        return len(self.artifact.levels) - 1

    @property
    def device(self) -> torch.device:
        return self.nested[0].dense.device

    def train_factors(self, levels: list[int]):
        """Lets the factors train that these levels run."""
        for i, nested in enumerate(self.nested):
            for level in levels:
                form = self.artifact.levels[level].forms[i]
                if form in ("residual", "prefix"):
                    getattr(nested, f"{form}_a").requires_grad_()
                    getattr(nested, f"{form}_bt").requires_grad_()

    def train_vectors(self):
        """Lets norms and biases train, which all levels share."""
        for parameter in self.model.parameters():
            if parameter.dim() == 1:
                parameter.requires_grad_()

    def teacher(self) -> "NestedModel":
        """The full level as it is now, sharing whatever does not train."""
        tensors = [*self.parameters(), *self.buffers()]
        shared = {id(t): t for t in tensors if not t.requires_grad}
        shared[id(self.artifact)] = self.artifact
        teacher = copy.deepcopy(self, shared).requires_grad_(False)
        teacher.set_level(self.full_level)
        return teacher

    def checkpoint_activations(self):
        """Computes each block anew in the backward pass instead of keeping what is in it."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers heeds it only in training mode, which would bring dropout along.
        for module in self.model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True

    def precision(self):
        """The context of a pass: products in bf16 where the device has them."""
        kind = self.device.type
        if kind == "cuda":
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            has_bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
        return torch.autocast(kind, torch.bfloat16) if has_bf16 else contextlib.nullcontext()

    def write(self, directory):
        """Writes the artifact anew, with the factors, norms and biases as they are now."""
        source = Artifact(self.artifact.directory)
        tensors = dict(source.tensors)
        for nested in self.nested:
            tensors.update(nested.factor_tensors())
            if nested.bias is not None:
                tensors[f"{nested.layer.name}.bias"] = nested.bias.detach().float().cpu()
        own = dict(self.model.named_parameters())
        for name, tensor in source.others().items():
            if tensor.dim() == 1:
                tensors[name] = own[name].detach().to(tensor.dtype).cpu()
        source.write(directory, tensors)

    def set_level(self, index: int):
        level = self.artifact.levels[index]
        for nested, form, rank in zip(self.nested, level.forms, level.ranks):
            nested.set_level(form, rank)

    def compose(self, compiles: bool):
        """From here on set_level makes one matrix of each layer, and passes see no more of the
        level than that, so that blocks compiled once serve every level. For passes of many rows,
        which would rather do one large product than two thin ones. After backward passes,
        `spread_gradients` is to be called."""
        for nested in self.nested:
            nested.composes = True
        if compiles:
            base = self.model if self.is_encoder else self.model.base_model
            blocks = base.encoder.layer if self.is_encoder else base.layers
            for block in blocks:
                block.compile(dynamic=self.is_encoder)

    def spread_gradients(self):
        """Takes the gradients by the level's matrices on to what they are made of."""
        pairs = [pair for nested in self.nested if (pair := nested.take_gradient()) is not None]
        if pairs:
            torch.autograd.backward(*zip(*pairs))

    def hidden(self, tokens: torch.Tensor, mask=None) -> torch.Tensor:
        """Last hidden states [batch, length, hidden] of token ids [batch, length]; `mask`, of the
        same shape, is 0 where there is padding."""
        with self.precision():
            if self.is_encoder:
                return self.model(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
            embedded = self.model.get_input_embeddings()(tokens)
            if torch.is_autocast_enabled(tokens.device.type):  # so is then what blocks add to
                embedded = embedded.to(torch.get_autocast_dtype(tokens.device.type))
            base = self.model.base_model
            output = base(inputs_embeds=embedded, attention_mask=mask, use_cache=False)
            return output.last_hidden_state.float()

    def embeddings(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """An encoder's sentence embeddings [batch, hidden] of norm 1, pooled as it says."""
        hidden = self.hidden(tokens, mask)
        if self._pools_first():
            pooled = hidden[:, 0]
        else:
            weights = mask.unsqueeze(-1).float()
            pooled = (hidden * weights).sum(1) / weights.sum(1)
        return F.normalize(pooled, dim=-1)

    def _pools_first(self) -> bool:
        path = self.artifact.directory / "1_Pooling" / "config.json"
        return path.is_file() and json.loads(path.read_text()).get("pooling_mode_cls_token", False)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(tokens))
