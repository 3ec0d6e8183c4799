"""What a fit is of: model, data, options. A checkpoint of another fit is told by it."""

import hashlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import pyro_nf
from pyro_nf.compiler import trees
from pyro_nf.inference.steps import read, write
from pyro_nf.programs.grouped import log_prob_of
from pyro_nf.programs.program import BoundProgram, TracePair
from pyro_nf.programs.sites import is_data, is_deterministic
from pyro_nf.programs.traces import log_prob_sum

Fingerprint = dict[str, dict[str, Any]]
"""`{kind of thing: {name: plain value}}`."""

# Densities that are rounded on another machine are the same up to this.
_TOLERANCE = 1e-4
# Each says something only where those before it are the same: other data have another density under any model.
_KINDS = ("version of pyro-nf", "option", "argument", "data of site", "parameters'", "log density, at a fixed draw,")
_CHANGING = "data that change during the fit"


class Identity:
    """A fit, as a checkpoint can know it.

    Code cannot be compared, but what it computes can: the model's log density, site by site, and the guide's, at a draw
    of fixed noise under fixed parameters.

    Args:
        program: Model and guide.
        params: The parameters, which keep their values.
        objective: What is maximised: its class and the options that made it are compared.
        options: Options of the fit, plain values.
        fixed: Whether these are all the data, not one of many minibatches.
    """

    def __init__(
        self,
        program: BoundProgram,
        params: Sequence[Tensor],
        objective: Any,
        options: Mapping[str, Any],
        fixed: bool,
    ) -> None:
        self._program, self._params, self._objective, self._options = program, params, objective, options
        self._fixed = fixed
        self._versions = self._data_versions()
        self._known: Fingerprint | None = None

    def fingerprint(self) -> Fingerprint:
        """Return what tells this fit from others, as it was on the first call."""
        if self._known is None:
            names = [n for n in inspect.signature(type(self._objective)).parameters if hasattr(self._objective, n)]
            settings = {f"objective.{name}": _described(getattr(self._objective, name)) for name in names}
            arguments, sites = self._data()
            values = (
                {"": pyro_nf.__version__},
                {**self._options, "objective": type(self._objective).__name__, **settings},
                arguments,
                sites,
                {"shapes": str([tuple(p.shape) for p in self._params]), "type": str(self._params[0].dtype)},
                self._densities(),
            )
            self._known = dict(zip(_KINDS, values, strict=True))
        if self._data_versions() != self._versions:  # a callback draws them anew, say
            self._known |= {"argument": {_CHANGING: True}, "data of site": {}, _KINDS[-1]: {}}
        return self._known

    def check(self, path: str, was: Fingerprint, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Give model and guide the tensors of a checkpoint, and raise a `ValueError` if it is of another fit.

        Args:
            path: The checkpoint's, for the message.
            was: Its fingerprint.
            tensors: What `fixed_tensors` returned when it was written.
        """
        before = self.fixed_tensors()
        self._set_fixed_tensors(tensors)
        found = _differences(was, self.fingerprint())
        if found:
            self._set_fixed_tensors(before)
            raise ValueError(
                f"checkpoint {path!r} is of another fit: {'; '.join(found)}. Resume with what it was, or run the fit "
                "anew, with another checkpoint"
            )

    def fixed_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the buffers of model and guide, which steps read but do not train: what a warm start found, say."""
        found = {}
        for role, module in self._modules():
            names = dict(module.named_buffers()).keys()
            found[role] = {name: value.clone() for name, value in module.state_dict().items() if name in names}
        return found

    def _set_fixed_tensors(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        for role, module in self._modules():
            state, given = module.state_dict(), tensors.get(role, {})
            # What does not fit is of another model or guide, whose density tells.
            fitting = {
                name: value for name, value in given.items() if name in state and state[name].shape == value.shape
            }
            if fitting:
                module.load_state_dict({**state, **fitting})

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        for role, part in (("model", self._program.program.model), ("guide", self._program.program.guide)):
            if isinstance(part, nn.Module):
                yield role, part

    def _data_versions(self) -> list[int]:
        leaves = trees.leaves_of((self._program.args, self._program.kwargs))
        return [leaf._version for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]

    def _data(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Describe the model's arguments, and its observed values, which may come from elsewhere."""
        if not self._fixed:
            return {"": "minibatches"}, {}
        arguments = {}
        for given in (self._program.args, self._program.kwargs):
            for path, leaf in trees.leaves_with_paths(given):
                first: Any = path[0]
                name = str(first.idx + 1) if given is self._program.args else repr(first.key)
                arguments[name + trees.path_string(path[1:])] = _described(leaf)
        structure = self._program.spec
        if structure.subsamples:  # the observed values are some of the data, by chance
            return arguments, {}
        observed = [site for site in structure.traces.model.nodes.values() if is_data(site)]
        return arguments, {repr(site["name"]): _described(site["value"]) for site in observed}

    def _densities(self) -> dict[str, Any]:
        def terms(particle: TracePair) -> dict[str, Tensor]:
            log_q, _ = log_prob_sum(particle.guide), log_prob_sum(particle.model)
            sites = [site for site in particle.model.nodes.values() if site["type"] == "sample"]
            log_p = {
                f"of site {site['name']!r}": log_prob_of(site).sum() for site in sites if not is_deterministic(site)
            }
            return log_p | {"of the guide": log_q}

        with torch.random.fork_rng(), _fixed_values(self._params), torch.no_grad():
            torch.manual_seed(0)
            draws = self._program.draw(1)
            found = self._program.vmap_traces(terms, draws)
        return {name: float(value) for name, value in found.items()}


@contextmanager
def _fixed_values(params: Sequence[Tensor]) -> Iterator[None]:
    """Give the parameters values that depend on nothing: what a guide starts from may be random."""
    before = read(params)
    write(0.1 * torch.arange(len(before), device=before.device).to(before).sin(), params)
    try:
        yield
    finally:
        write(before, params)


def _differences(was: Fingerprint, now: Fingerprint) -> list[str]:
    """Return in words what differs between two fits, of the first kind of things that do."""
    changing = any(_CHANGING in each.get("argument", {}) for each in (was, now))
    for kind in _KINDS:
        if changing and kind not in ("version of pyro-nf", "option", "parameters'"):
            continue
        before, after = was.get(kind, {}), now[kind]
        found = [
            f"the {' '.join(filter(None, [kind, name]))} was {_shown(before, name)} and is {_shown(after, name)}"
            for name in dict.fromkeys([*before, *after])
            if not (name in before and name in after and _same(before[name], after[name], kind == _KINDS[-1]))
        ]
        if found:
            return found
    return []


def _same(one: Any, other: Any, rounded: bool) -> bool:
    if rounded and math.isfinite(one) and math.isfinite(other):
        return math.isclose(one, other, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    return type(one) is type(other) and (one == other or one != one)  # NaN is the same as NaN


def _shown(values: dict[str, Any], name: str) -> str:
    value = values.get(name, "missing")
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _described(value: Any) -> Any:
    """Describe a value by plain ones: a tensor by its shape, its mean and its checksum, an object by its type."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if not isinstance(value, Tensor):
        return type(value).__name__
    dense = value.detach() if value.layout == torch.strided else value.detach().to_dense()
    dense = dense.resolve_conj().resolve_neg().contiguous().reshape(-1).cpu()
    checksum = hashlib.sha256(dense.view(torch.uint8).numpy().data).hexdigest()[:16]
    finite = dense[dense.isfinite()]
    mean = f" and mean {float(finite.double().mean()):.6g}" if len(finite) and not dense.is_complex() else ""
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}{mean} (SHA-256 {checksum})"
