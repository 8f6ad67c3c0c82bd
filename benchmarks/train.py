"""The training benchmark: steps of pretraining (masked words and entities, backward, AdamW), a process a contender.

A process each, since both models with their states and eager's logits of all entities would not fit into one; they take
turns, and one waits while the other works.
"""

import dataclasses
import multiprocessing
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks import batches, encoders, measure, records, timing
from benchmarks.batches import Batch
from benchmarks.encoders import PACKED, TRANSFORMERS
from benchmarks.measure import Record
from luke_kernels import LukeConfig, LukeForMaskedLM

OP = "train"
DIRECTION = "step"
CPU_BATCHES = ("wikipedia-32",)
GPU_BATCHES = ("32x512x32",)
DEVICE_BATCHES = {"cpu": CPU_BATCHES, "cuda": GPU_BATCHES}
CONTENDERS = (TRANSFORMERS, PACKED)
ENTITY_VOCAB_SIZE = 500_000  # LUKE's (Yamada et al. 2020, section 3.3)
MASKED_SHARE = 0.15  # ibid.
MASK_WORD, MASK_ENTITY, IGNORED = 50264, 2, -100
# Small, that the losses of later steps stay near; AdamW's first step moves every weight by as much.
LEARNING_RATE = 1e-5
# Largest relative differences of the first two losses, and of the norm of each gradient, from eager's: a truth in
# float64 would take twice eager's memory. Narrower dtypes have multiples of eps.
LOSS_BOUND = {torch.float32: 1e-5, torch.float64: 1e-9}
NORM_BOUND = {torch.float32: 1e-3, torch.float64: 1e-8}
LOSS_EPS, NORM_EPS = 4, 16
# Gradients of queries and keys round with those of the values, that of a key's bias is nothing else: this share of the
# values' is added to what theirs are relative to.
VALUE_SHARE = 1 / 16
# What stays free for others, of the memory available.
FREE_SHARE = 0.15
# What a process takes beside its tensors.
PROCESS_BYTES = 2**30


@dataclass(frozen=True)
class Job:
    """What a process trains."""

    contender: str
    size: str
    entity_vocab_size: int
    dtype: torch.dtype
    case: str
    sequences: int
    device: str
    threads: int
    limit_bytes: int


@dataclass(frozen=True)
class Examples:
    """A batch in which words and entities are masked, and what they were, packed."""

    batch: Batch
    labels: Tensor
    entity_labels: Tensor

    @property
    def masked(self) -> tuple[int, int]:
        """How many words and entities are to be predicted."""
        words, entities = (int((each != IGNORED).sum()) for each in (self.labels, self.entity_labels))
        return words, entities

    def inputs(self, contender: str) -> dict[str, Any]:
        packed = self.batch.packed
        if contender == PACKED:
            return {"input_ids": packed, "labels": self.labels, "entity_labels": self.entity_labels}
        labels = {
            "labels": packed.pad_words(self.labels, fill=IGNORED),
            "entity_labels": packed.pad_entities(self.entity_labels, fill=IGNORED),
        }
        return self.batch.padded | labels


def mask(batch: Batch) -> Examples:
    """Mask MASKED_SHARE of the words and of the entities, one of each at least."""
    generator = torch.Generator().manual_seed(encoders.SEED)

    def draw(ids: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randperm(len(ids), generator=generator)[: max(1, round(MASKED_SHARE * len(ids)))]
        inputs, labels = ids.clone(), torch.full_like(ids, IGNORED)
        inputs[chosen], labels[chosen] = mask_id, ids[chosen]
        return inputs, labels

    packed = batch.packed
    assert packed.input_ids is not None
    words, labels = draw(packed.input_ids, MASK_WORD)
    entities, entity_labels = draw(packed.entity_ids, MASK_ENTITY)
    masked = dataclasses.replace(packed, input_ids=words, entity_ids=entities)
    return Examples(Batch(batch.name, masked), labels, entity_labels)


def flops(examples: Examples, config: LukeConfig) -> float:
    """Count the encoder's and, of the heads, what scores the masked words and entities."""
    words, entities = examples.masked
    size, emb_size = config.hidden_size, config.entity_emb_size
    assert emb_size is not None
    heads = 2 * words * size * (size + config.vocab_size) + 2 * entities * emb_size * (size + config.entity_vocab_size)
    return examples.batch.flops(config, "both") + 3 * heads


def draw_model(config: LukeConfig, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Make transformers' eager LukeForMaskedLM, its weights drawn."""
    settings = transformers.LukeConfig(**config.to_dict(), attn_implementation="eager")
    with device:
        model = transformers.LukeForMaskedLM(settings)
    # transformers 5 leaves them apart, unlike LUKE.
    model.lm_head.decoder.weight = model.luke.embeddings.word_embeddings.weight
    encoders.draw_weights(model, device)
    return model.to(dtype)


class Training:
    """A model, its optimizer and its examples."""

    def __init__(self, job: Job):
        self.device = torch.device(job.device)
        config = encoders.config_of(job.size, job.entity_vocab_size)
        model = draw_model(config, job.dtype, self.device)
        if job.contender == PACKED:
            with torch.device("meta"):
                ours = LukeForMaskedLM(LukeConfig.from_dict(model.config.to_dict()))
            ours.load_state_dict(model.state_dict(), assign=True)
            model = ours
        self.model = model.train()
        batch = batches.load(job.case, config, self.device).first(job.sequences)
        self.inputs = mask(batch).inputs(job.contender)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=True)

    def judge(self) -> Record:
        """Make the first step; return its loss and the norms of its gradients."""
        loss = self._backward()
        gradients = {name: each.grad for name, each in self.model.named_parameters() if each.grad is not None}
        norms = {name: gradient.double().norm().item() for name, gradient in gradients.items()}
        self._update()
        return {"loss": loss, "norms": norms}

    def step(self) -> Record:
        """Make a step; return its loss and how long it took."""
        begin = time.perf_counter()
        loss = self._backward()
        self._update()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return {"loss": loss, "ms": (time.perf_counter() - begin) * 1e3}

    def memory(self) -> Record:
        """Make a step; return also by how much the memory grows, over weights and the optimizer's states."""
        found: Record = {}
        peak = timing.peak_memory_bytes(lambda: found.update(self.step()), self.device)
        return found | {"peak_memory_bytes": peak}

    def _backward(self) -> float:
        loss = self.model(**self.inputs).loss
        loss.backward()
        return loss.item()

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def work(job: Job, pipe: Connection) -> None:
    """Do what is asked for through the pipe, until it is closed."""
    torch.set_num_threads(job.threads)
    if job.device == "cpu":
        # To be told of too little memory, where the system would kill some process.
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (job.limit_bytes, hard))
    try:
        training = Training(job)
        pipe.send({})
        while (name := pipe.recv()) is not None:
            pipe.send(getattr(training, name)())
    except (*timing.failures(), MemoryError) as error:
        pipe.send({"error": timing.described(error)})


class WorkerError(RuntimeError):
    """A contender cannot go on; the message says why."""


def is_of_memory(message: str) -> bool:
    """Tell whether a contender failed for want of memory: of torch, of Python and C++, or killed by the system."""
    return any(words in message.lower() for words in ("memory", "bad_alloc", "code -9"))


class Worker:
    """A process that trains."""

    def __init__(self, job: Job):
        # Threads of torch's do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(job, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def wait(self) -> Record:
        """Return its answer.

        Raises:
            WorkerError: it failed or ended.
        """
        try:
            answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise WorkerError(f"the process ended with code {self.process.exitcode}") from None
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def ask(self, name: str) -> Record:
        self.pipe.send(name)
        return self.wait()


def judge(found: Record, eager: Record, dtype: torch.dtype) -> Record:
    """Compare the first losses and the norms of all gradients with eager's; tell of the loss and the worst gradient."""
    norms, others = found["norms"], eager["norms"]
    if norms.keys() != others.keys():
        return {"gate": "wrong", "message": f"other gradients: {sorted(norms.keys() ^ others.keys())}"[:500]}
    narrow = torch.finfo(dtype).eps
    bound = dict.fromkeys(others, NORM_BOUND.get(dtype, NORM_EPS * narrow))
    bound["loss"] = LOSS_BOUND.get(dtype, LOSS_EPS * narrow)
    losses = zip(found["losses"], eager["losses"], strict=True)
    errors = {name: abs(norms[name] - other) / (_scale(name, others) or 1) for name, other in others.items()}
    errors["loss"] = max(abs(loss - other) / abs(other) for loss, other in losses)
    # NaN is beyond every bound.
    beyond = [name for name, error in errors.items() if not error <= bound[name]]
    told = {"loss", max(others, key=lambda name: (name in beyond, errors[name]))}
    return {
        "gate": "wrong" if beyond else "pass",
        "message": f"beyond its bound: {', '.join(beyond)}"[:500] if beyond else None,
        "error": measure.without_nan({name: errors[name] for name in told}),
        "bound": {name: bound[name] for name in told},
    }


def _scale(name: str, norms: dict[str, float]) -> float:
    """Return what the difference of a gradient's norm is relative to."""
    *module, projection, kind = name.split(".")
    values = norms.get(".".join([*module, "value", kind]), 0.0) if projection.endswith(("query", "key")) else 0.0
    return norms[name] + VALUE_SHARE * values


def run_case(
    name: str,
    size: str,
    entity_vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    peak_tflops: float,
    run: Record,
) -> list[Record]:
    """Gate and time both contenders on as many sequences of a batch, from all on by halves, as eager has memory for.

    Args:
        name: As of `batches.load`.
        repeats: Timed steps of each, at most.
        peak_tflops: `timing.measure_peak` of the same run.
        run: What all records of a run share, from `records.describe_run`.

    Returns:
        A record a contender. Its `peak_memory_bytes` is over the weights and the optimizer's states.
    """
    config = encoders.config_of(size, entity_vocab_size)
    whole = batches.load(name, config, torch.device("cpu"))
    if int(whole.packed.entity_ids.max()) >= entity_vocab_size:
        raise ValueError(f"entities must be more than the ids of {name}, got {entity_vocab_size}")
    limit_bytes = limit_of(config, device)
    sequences, reasons = whole.packed.batch_size, []
    while True:
        batch = whole.first(sequences)
        job = Job(
            *(TRANSFORMERS, size, entity_vocab_size, dtype, name, sequences),
            *(str(device), torch.get_num_threads(), limit_bytes),
        )
        need_bytes = eager_bytes(batch, config, dtype)
        smallest = sequences == 1
        if need_bytes > limit_bytes and not smallest:
            reasons.append(f"{sequences} sequences take eager some {need_bytes / 2**30:.0f} GiB")
        else:
            rows = _compete(job, batch, config, repeats, peak_tflops, run)
            eager = rows[0]
            if eager["gate"] != "failed" or smallest or not is_of_memory(eager["message"]):
                break
            reasons.append(f"{sequences} sequences: {eager['message']}")
        sequences //= 2
    if reasons:
        told = f"cut: {'; '.join(reasons)}; there are {limit_bytes / 2**30:.0f} GiB"
        for row in rows:
            row["message"] = "; ".join(filter(None, (row["message"], told)))[:500]
    return rows


def _compete(job: Job, batch: Batch, config: LukeConfig, repeats: int, peak_tflops: float, run: Record) -> list[Record]:
    shared = records.blank() | run | {"op": OP, "direction": DIRECTION, "backend": "auto", "size": job.size}
    shared |= {"case": batch.name, "dtype": str(job.dtype).removeprefix("torch."), "matmul_peak_tflops": peak_tflops}
    shared["shape"] = batch.shape | {"N": job.entity_vocab_size}
    rows = {name: shared | {"contender": name} for name in CONTENDERS}
    found: dict[str, Record] = {}
    with Worker(job) as eager, Worker(dataclasses.replace(job, contender=PACKED)) as ours:
        workers = {TRANSFORMERS: eager, PACKED: ours}
        times: dict[str, list[float]] = {name: [] for name in workers}

        def fail(name: str, error: WorkerError) -> None:
            rows[name] |= {"gate": "failed", "message": str(error), "peak_memory_bytes": None}
            del workers[name]

        round_s = 0.0
        for name, worker in list(workers.items()):
            try:
                worker.wait()
                first, second = worker.ask("judge"), worker.ask("memory")
            except WorkerError as error:
                fail(name, error)
                if name == TRANSFORMERS:
                    break
                continue
            found[name] = {"losses": [first["loss"], second["loss"]], "norms": first["norms"]}
            rows[name]["peak_memory_bytes"] = second["peak_memory_bytes"]
            round_s += second["ms"] / 1e3
        if TRANSFORMERS not in found:
            rows[PACKED] |= {"gate": "failed", "message": "eager, which it is judged by, failed"}
            return list(rows.values())
        for name in list(workers):
            rows[name] |= judge(found[name], found[TRANSFORMERS], job.dtype)
            if rows[name]["gate"] == "wrong":
                rows[name]["peak_memory_bytes"] = None
                del workers[name]
        warm_up, repeats = timing.plan_rounds(round_s, repeats)
        for turn in range(warm_up + repeats):
            order = list(workers)
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                try:
                    ms = workers[name].ask("step")["ms"]
                except WorkerError as error:
                    fail(name, error)
                    continue
                times[name] += [ms] if turn >= warm_up else []
    count = flops(mask(batch), config)
    for name in workers:
        row = rows[name]
        row |= timing.quantiles(times[name]) | {"repeats": repeats}
        seconds = row["median_ms"] / 1e3
        row["tflops"] = count / seconds / 1e12
        row["fraction_of_peak"] = row["tflops"] / peak_tflops
        row["tokens_per_s"] = batch.shape["real_tokens"] / seconds
        row["sequences_per_s"] = batch.shape["B"] / seconds
    return list(rows.values())


def eager_bytes(batch: Batch, config: LukeConfig, dtype: torch.dtype) -> int:
    """Estimate what eager's step takes: the weights with theirs, logits of all tokens, what the backward keeps."""
    shape, size = batch.shape, config.hidden_size
    tokens = shape["padded_tokens"]
    # Logits, their logarithms and their gradient.
    logits = 3 * shape["B"] * (shape["W"] * config.vocab_size + shape["E"] * config.entity_vocab_size)
    # Of each layer: some 12 states a token, and the probabilities.
    kept = 12 * tokens * size + config.num_attention_heads * shape["B"] * (shape["W"] + shape["E"]) ** 2
    numbers = 4 * num_parameters(config) + logits + config.num_hidden_layers * kept
    return dtype.itemsize * numbers + PROCESS_BYTES


def num_parameters(config: LukeConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in LukeForMaskedLM(config).parameters())


def limit_of(config: LukeConfig, device: torch.device) -> int:
    """Return how much a process may take while the other keeps its weights, gradients and states."""
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[0]
    else:
        lines: Sequence[str] = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return int((1 - FREE_SHARE) * available) - 16 * num_parameters(config) - PROCESS_BYTES
