"""Every field of a run, typed. Hydra composes conf/ into these dataclasses.

Imports neither torch nor deepspeed: composing, `--help` and refusing must be instant.
Enum members are written in lower case because their names are what a user types.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional

from omegaconf import MISSING

# `Optional[...]` and not `... | None`: omegaconf 2.3 reads both, but reports the former legibly.
# ruff: noqa: UP045


class InputKind(Enum):
    """`tokens`: text, predicts the next token at each position. `patches`: images, predicts a class."""

    tokens = "tokens"
    patches = "patches"


class NormKind(Enum):
    """`layer_norm`: weight and bias. `rms_norm`: weight only (arXiv 1910.07467)."""

    layer_norm = "layer_norm"
    rms_norm = "rms_norm"


class NormPlacement(Enum):
    """`pre`: before attention and MLP. `post`: after them, before the residual sum. `sandwich`: both."""

    pre = "pre"
    post = "post"
    sandwich = "sandwich"


class QueryKeyNorm(Enum):
    """RMSNorm of queries and keys: `none`, of each head (`head`), or of all heads together (`projection`)."""

    none = "none"
    head = "head"
    projection = "projection"


class ResidualKind(Enum):
    """`sequential`: the MLP reads the sum after attention. `parallel`: both read the block's input."""

    sequential = "sequential"
    parallel = "parallel"


class PositionKind(Enum):
    """`learned`: a vector per position, added to the embedding. `rope`: rotated queries and keys."""

    learned = "learned"
    rope = "rope"


class RopeScalingKind(Enum):
    """Longer rotary wavelengths: `linear` (arXiv 2306.15595), `llama3` (Llama 3.1), `yarn` (2309.00071)."""

    none = "none"
    linear = "linear"
    llama3 = "llama3"
    yarn = "yarn"


class MLPKind(Enum):
    """`gelu` (tanh form), `gelu_erf` (exact): up projection. `swiglu`, `geglu`: gate and up (2002.05202)."""

    gelu = "gelu"
    gelu_erf = "gelu_erf"
    swiglu = "swiglu"
    geglu = "geglu"


class AttentionKind(Enum):
    """`causal`: each position attends to itself and earlier positions. `full`: to every position."""

    causal = "causal"
    full = "full"


class Pooling(Enum):
    """Input of a classifier's head: the class token beside the patches, or the mean of the patches."""

    class_token = "class_token"
    mean = "mean"


class ActivationCheckpointing(Enum):
    """Recomputed in the backward pass: nothing, the attention core (arXiv 2205.05198), or whole blocks."""

    none = "none"
    selective = "selective"
    full = "full"


class ContextMethod(Enum):
    """How context-parallel ranks, each with a part of every sequence, compute attention over whole sequences.

    ring: keys and values are sent from rank to rank, while each rank computes scores with the last received
    ones (arXiv 2310.01889). gather: every rank gathers all keys and values. ulysses: all-to-alls exchange
    parts of the sequence for heads and back (arXiv 2309.14509).
    """

    ring = "ring"
    gather = "gather"
    ulysses = "ulysses"


class Dtype(Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class RouterKind(Enum):
    """Scores of the experts: `softmax` over all, or `sigmoid` of each (DeepSeek-V3, arXiv 2412.19437)."""

    softmax = "softmax"
    sigmoid = "sigmoid"


# 1f1b: one forward, one backward (Narayanan et al., arXiv 2104.04473). dualpipev: every rank holds two
# stages, and micro-batches travel out through the first and back through the second (DeepSeek-V3).
# The functional form, since the field's name for the first is no Python identifier.
PipelineSchedule = Enum("PipelineSchedule", {"1f1b": "1f1b", "dualpipev": "dualpipev"})


class Device(Enum):
    """`auto` means CUDA where the machine has GPUs, else CPU."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class CorpusSource(Enum):
    """`stdlib`: the Python standard library's own source text. `text`: the user's files, as bytes.

    `tokens`: Megatron-LM's indexed datasets, as its preprocess_data.py or `launcher prepare` write them.
    `chat`: conversations, of which only the assistant's messages are learned.
    `digits`: scikit-learn's 1797 scans of handwritten digits. `image_folder`: a directory per class.
    """

    stdlib = "stdlib"
    text = "text"
    tokens = "tokens"
    chat = "chat"
    digits = "digits"
    image_folder = "image_folder"


class OptimizerName(Enum):
    adamw = "adamw"
    sgd = "sgd"


class SchedulerName(Enum):
    cosine = "cosine"
    linear = "linear"
    wsd = "wsd"
    constant = "constant"


class StatesDtype(Enum):
    fp32 = "fp32"
    bf16 = "bf16"


class OutputFormat(Enum):
    """`table` for people, `json` for machines."""

    table = "table"
    json = "json"


class WandbMode(Enum):
    """`auto` means online where an API key is found, else offline."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


class Tasks(Enum):
    """srun starts every rank (`per_rank`), or on each node a launcher that starts its ranks (`per_node`)."""

    per_rank = "per_rank"
    per_node = "per_node"


class OnStop(Enum):
    """After an early stop: `requeue` the same job, `chain` a new job of the same script, or `end`."""

    requeue = "requeue"
    chain = "chain"
    end = "end"


@dataclass(unsafe_hash=True)
class BiasesConfig:
    """Projections that add a bias vector. A LayerNorm and the patch projection always add a bias."""

    qkv: bool = MISSING  # queries, keys and values
    output: bool = MISSING  # attention output
    up: bool = MISSING  # MLP input, with swiglu the gate too
    down: bool = MISSING  # MLP output
    head: bool = MISSING  # logits


@dataclass(unsafe_hash=True)
class RopeScalingConfig:
    """Scaling of the rotary positions of a model that was pretrained on shorter sequences."""

    kind: RopeScalingKind = RopeScalingKind.none
    factor: float = 1.0  # factor of the length; long wavelengths are multiplied by it
    original_length: Optional[int] = None  # llama3, yarn: sequence length before scaling
    low_frequency_factor: float = 1.0  # llama3: wavelengths above original_length / this are scaled
    high_frequency_factor: float = 4.0  # llama3: wavelengths below original_length / this are not
    beta_fast: float = 32.0  # yarn: channels that turn more often in original_length are not scaled
    beta_slow: float = 1.0  # yarn: channels that turn less often are scaled by the whole factor
    attention_factor: Optional[float] = None  # yarn: factor of rotated channels; null: 0.1 ln(factor) + 1


@dataclass(unsafe_hash=True)
class ExpertsConfig:
    """Mixture of experts: each token runs through the `top_k` experts that its router scores highest.

    No token is dropped. After the first `first_dense_layers` layers, every n-th layer (`every`) has experts.
    """

    count: int = 0  # experts of a layer; 0: no layer has experts
    top_k: int = 0  # experts that each token runs through
    ffn_hidden_size: int = 0  # columns of an expert
    shared: int = 0  # experts that every token runs through, as one MLP of shared x ffn_hidden_size
    first_dense_layers: int = 0  # layers at the start without experts
    every: int = 1  # n: after the first dense layers, the n-th, the 2n-th, ... has experts
    router: RouterKind = RouterKind.softmax
    normalize_top_k: bool = True  # the weights of the chosen experts add up to 1
    scaling: float = 1.0  # factor of the weights of the chosen experts
    auxiliary_loss: float = 0.0  # factor of the load-balancing loss of each sequence (DeepSeek-V3); 0: off
    z_loss: float = 0.0  # factor of the mean square of the logits' logsumexp (arXiv 2202.08906); 0: off
    # Step of the biases by which experts are chosen: up if few tokens chose the expert, else down; 0: off
    bias_balancing: float = 0.0
    router_dtype: Dtype = Dtype.fp32  # dtype of the scores; only fp32


@dataclass(unsafe_hash=True)
class ModelConfig:
    """A transformer described by its parts and sizes."""

    inputs: InputKind = MISSING
    norm: NormKind = MISSING
    positions: PositionKind = MISSING
    mlp: MLPKind = MISSING
    attention: AttentionKind = MISSING
    biases: BiasesConfig = field(default_factory=BiasesConfig)
    hidden_size: int = MISSING
    num_layers: int = MISSING
    num_heads: int = MISSING
    num_kv_heads: Optional[int] = None  # null: num_heads (no grouping)
    head_size: Optional[int] = None  # null: hidden_size / num_heads
    ffn_hidden_size: int = MISSING
    vocab_size: int = MISSING  # 0 with inputs=patches
    max_sequence_length: int = MISSING  # 0 with inputs=patches
    tie_embeddings: bool = MISSING  # head and token embedding share one weight
    dropout: float = 0.0
    norm_epsilon: float = 1e-5
    norm_placement: NormPlacement = NormPlacement.pre
    query_key_norm: QueryKeyNorm = QueryKeyNorm.none
    residual: ResidualKind = ResidualKind.sequential
    rope_theta: float = 10000.0  # base of the rotary frequencies
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    rotary_fraction: float = 1.0  # share of the channels of a head that is rotated
    sliding_window: Optional[int] = None  # positions that a position attends to, itself counted; null: all
    full_attention_every: Optional[int] = None  # every n-th layer has no window; null: all layers have it
    local_rope_theta: Optional[float] = None  # rope_theta of layers with a window; null: rope_theta
    attention_scale_size: Optional[float] = None  # scores are divided by its root; null: head_size
    attention_soft_cap: Optional[float] = None  # scores become cap * tanh(score / cap)
    logit_soft_cap: Optional[float] = None  # logits become cap * tanh(logit / cap)
    embedding_scale: float = 1.0  # token embeddings are multiplied by it
    init_std: float = 0.02  # standard deviation of the initial weights
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    # Set with inputs=patches only, else 0.
    num_classes: int = 0
    image_size: int = 0  # pixels per side
    image_channels: int = 0  # 1: grey, 3: red, green, blue
    patch_size: int = 0  # pixels per side
    pooling: Optional[Pooling] = None


@dataclass
class ParallelismConfig:
    tensor: int = 1
    pipeline: int = 1
    data: Optional[int] = None  # null: world size / (tensor x pipeline x context)
    # Ranks over which each sequence is split: a rank holds the activations of 1/context of its tokens.
    context: int = 1
    context_method: ContextMethod = ContextMethod.ring
    expert: int = 1  # data x context ranks over which the experts of each layer are distributed
    zero_stage: int = 0
    sequence_parallel: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    pipeline_schedule: PipelineSchedule = PipelineSchedule["1f1b"]
    auto: bool = False  # choose the layout fields above (not the schedule) and the micro-batch size
    # Pad the vocabulary of each tensor rank to a multiple of this; null: 128 on cuda (fast products), else 1.
    vocabulary_multiple: Optional[int] = None


@dataclass
class PeakFlops:
    """Dense peak of one accelerator in FLOP/s by dtype; null where it is not known."""

    fp32: Optional[float] = None
    bf16: Optional[float] = None
    fp16: Optional[float] = None


@dataclass
class Point:
    """A measured rate at one size."""

    size: float
    per_s: float


@dataclass
class MeasuredProducts:
    """FLOP/s of matrix products by the FLOPs of a product."""

    fp32: list[Point] = field(default_factory=list)
    bf16: list[Point] = field(default_factory=list)
    fp16: list[Point] = field(default_factory=list)


@dataclass
class MeasuredCollective:
    """Bandwidth by size: of the reduced or sent tensor, or of the full gathered or scattered tensor."""

    kind: str = MISSING  # all_reduce, all_gather, reduce_scatter, all_to_all or send
    ranks: int = MISSING
    points: list[Point] = field(default_factory=list)


@dataclass
class Scale:
    """Measured time of a model's operations, over the sum of their separately measured times."""

    flops: float  # per block and micro-batch, forward and backward
    factor: float


@dataclass
class MeasuredRates:
    """Rates that `launcher calibrate` measured on each of `ranks` ranks of a machine at the same time."""

    ranks: int = MISSING
    products: MeasuredProducts = field(default_factory=MeasuredProducts)
    elementwise: list[Point] = field(default_factory=list)  # bytes/s read and written, by tensor size
    stream: float = MISSING  # bytes/s of an optimizer update that exceeds the caches
    operation_s: float = MISSING  # fixed seconds per operation
    step_s: float = 0.0  # fixed seconds per step
    micro_batch_s: float = 0.0  # fixed seconds per micro-batch
    zero_2_block_s: float = 0.0  # fixed seconds per block and micro-batch under ZeRO-2
    zero_3_block_s: float = 0.0  # the same under ZeRO-3
    pipeline_batch_s: float = 0.0  # further seconds per micro-batch in each stage of a pipeline
    scales: list[Scale] = field(default_factory=list)  # by model size; empty: factor 1
    waiting_scales: list[Scale] = field(default_factory=list)  # where ranks wait for each other in a pass
    collectives: list[MeasuredCollective] = field(default_factory=list)


@dataclass
class AttentionRate:
    """Rate of fused causal attention with heads of `head_size`: FLOPs x (1 + ramp / tokens) / FLOP/s."""

    head_size: int = MISSING
    forward: float = MISSING  # FLOP/s of two products, of their causal half
    forward_ramp: float = 0.0  # tokens
    backward: float = MISSING  # FLOP/s of five products
    backward_ramp: float = 0.0  # tokens


@dataclass
class ShapeRates:
    """FLOP/s of products (m, k) x (k, n), with the time to write their result, by shape: 4096x1280x8192.

    Sizes are multiples of 8. Shapes are texts: a config object for each shape made every command slower.
    """

    fp32: dict[str, float] = field(default_factory=dict)
    bf16: dict[str, float] = field(default_factory=dict)
    fp16: dict[str, float] = field(default_factory=dict)


@dataclass
class CardRates:
    """Rates of the kernels of one accelerator, measured alone; null if not measured."""

    name: Optional[str] = None
    measured_on: Optional[str] = None  # date
    versions: Optional[str] = None
    products: PeakFlops = field(default_factory=PeakFlops)  # FLOP/s of large products, without their output
    shapes: ShapeRates = field(default_factory=ShapeRates)  # correct `products` near measured shapes
    unaligned: Optional[float] = None  # share of `products` if a size is not a multiple of 8
    attention: list[AttentionRate] = field(default_factory=list)
    memory_gb_s: Optional[float] = None  # GB/s read and written by copies
    update_gb_s: Optional[float] = None  # GB/s read and written by fused AdamW
    launch_s: Optional[float] = None  # seconds of the host to start an operation
    host_gb_s: Optional[float] = None  # GB/s between pinned host memory and the accelerator
    link_gb_s: Optional[float] = None  # GB/s that a rank sends in a large all-reduce within a node
    gather_gb_s: Optional[float] = None  # the same in any other collective; null: link_gb_s
    hop_s: Optional[float] = None  # seconds of latency of a step of a ring within a node
    context_bytes: Optional[float] = None  # memory of the CUDA context with its kernels; null: 0.6e9
    group_bytes: Optional[float] = None  # memory of NCCL for a group of ranks; null: 0.2e9


@dataclass
class HardwareConfig:
    device: Device = Device.auto
    nodes: int = 1
    accelerators_per_node: Optional[int] = None  # null: the GPUs or CPU cores of this machine
    memory_bytes: Optional[float] = None  # memory of one accelerator
    peak_flops: PeakFlops = field(default_factory=PeakFlops)
    gemm_efficiency: Optional[float] = None  # share of the peak that large matrix products reach
    memory_bandwidth_gb_s: Optional[float] = None  # device memory of one accelerator
    bandwidth_intra_node_gb_s: Optional[float] = None  # per accelerator, one direction
    bandwidth_inter_node_gb_s: Optional[float] = None  # per accelerator, one direction
    host_bandwidth_gb_s: Optional[float] = None  # between one accelerator and host memory
    host_memory_bytes: Optional[float] = None  # memory of a node, which its ranks share
    cores: Optional[int] = None  # cores that the CPU ranks share; null: one core per rank
    compute_scale: float = 1.0  # measured / planned time of computation, learned from finished runs
    card: CardRates = field(default_factory=CardRates)  # of GPUs; replaces the rates above
    # CPU ranks: one entry per number of ranks; replaces the rates above.
    measured: list[MeasuredRates] = field(default_factory=list)


@dataclass
class DataConfig:
    source: CorpusSource = MISSING
    # text: a glob of files; tokens: NAME of NAME.bin and NAME.idx, or a glob; image_folder: a directory;
    # chat: a glob of JSON lines, or NAME as `launcher prepare chat=true` wrote it
    train: Optional[str] = None
    validation: Optional[str] = None  # like `train`; null: a fraction of the training data
    validation_fraction: float = 0.05
    test: Optional[str] = None  # tokens, chat, images: like `train`; null: test_fraction of the training data
    test_fraction: float = 0.0
    # A blend of token files instead of `train`. You choose the names.
    sources: dict[str, str] = field(default_factory=dict)  # each like `train`
    weights: dict[str, float] = field(default_factory=dict)  # relative numbers of samples
    validation_sources: dict[str, str] = field(default_factory=dict)  # each like `validation`
    sequence_length: Optional[int] = None  # null: model.max_sequence_length
    document_attention: bool = False  # attention and positions stop where a document ends
    end_of_document: Optional[int] = None  # tokens, chat: id that ends each document; in bytes it is 0
    # A tokenizer.json. null: tokens: NAME.tokenizer.json beside the files; chat: bytes
    tokenizer: Optional[str] = None
    chat_template: Optional[str] = None  # chat: a file with a Jinja template; null: the tokenizer's template
    num_workers: int = 1  # reader threads per rank; 0: the step reads
    prefetch: int = 2  # global batches that are read ahead


@dataclass
class OptimizerConfig:
    name: OptimizerName = MISSING
    lr: float = MISSING
    weight_decay: float = 0.0
    gradient_clipping: Optional[float] = 1.0  # maximum global L2 norm; null: no clipping
    beta1: Optional[float] = None  # adamw
    beta2: Optional[float] = None  # adamw
    epsilon: Optional[float] = None  # adamw
    momentum: Optional[float] = None  # sgd


@dataclass
class SchedulerConfig:
    name: SchedulerName = MISSING
    warmup_steps: int = 0
    decay_steps: Optional[int] = None  # wsd: length of the final decay
    min_lr_ratio: float = 0.0  # final learning rate / optimizer.lr


@dataclass
class PrecisionConfig:
    dtype: Dtype = MISSING
    # fp32 | bf16: dtype of master weights (bf16: the weights themselves), optimizer states and gradient sums
    states: StatesDtype = StatesDtype.fp32
    initial_loss_scale_power: int = 16  # fp16: the first loss scale is 2 to this power


@dataclass
class WandbConfig:
    mode: WandbMode = WandbMode.auto
    project: str = "launcher"
    entity: Optional[str] = None
    name: Optional[str] = None
    group: Optional[str] = None
    tags: list[str] = field(default_factory=list)


@dataclass
class LoggingConfig:
    interval: int = 1  # steps between rows of metrics.jsonl, W&B and TensorBoard
    tensorboard: bool = False  # also write event files to run.dir/tensorboard/
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass
class TrainingConfig:
    steps: int = MISSING  # 0: only validate, such as the weights of checkpoint.init_from
    stop_at: Optional[int] = None  # end after this step; the schedule still spans `steps`
    global_batch_size: int = MISSING  # sequences per optimizer step, over all ranks
    micro_batch_size: int = MISSING  # sequences per forward pass of one data-parallel rank
    validation_interval: int = 50  # steps; 0: only at the end
    validation_batches: int = 8  # global batches per validation
    seed: int = 1234
    compile: Optional[bool] = None  # torch.compile for blocks and loss; null: on GPUs, not on CPU


@dataclass
class CheckpointConfig:
    """Saving a run's state, the checkpoints to keep, and the start of a run.

    The end of a run saves too. `resume`: `auto` resumes from the newest checkpoint in run.dir, if there is
    one; `none` starts anew; a path names a checkpoint, or the directory of a run, that a new run begins from.
    The same path then resumes that run. `init_from` also takes the result of `launcher import`, or a Hugging
    Face directory.
    """

    enabled: bool = True
    interval_steps: Optional[int] = None
    interval_minutes: Optional[float] = 15.0
    keep_last: int = 2
    keep_every_steps: Optional[int] = None  # never delete checkpoints at a multiple of this step
    keep_best: bool = True  # keep the checkpoint with the lowest validation loss
    stop_grace_seconds: Optional[float] = 60.0  # seconds a stopped run may use to save; null: no save
    asynchronous: bool = True  # write while training continues; false: the step waits
    stop_on_error: bool = False  # end the run if a checkpoint cannot be written
    max_file_gb: float = 2.0  # in 1e9 bytes
    resume: str = "auto"  # auto | none | a checkpoint or a run
    init_from: Optional[str] = None  # initial weights: a run, a checkpoint or a Hugging Face directory
    fallback: bool = False  # resume from an older checkpoint if the newest cannot be used
    new_blend: bool = False  # allow a blend that differs from the checkpoint's


@dataclass
class LoraConfig:
    """Low-rank adapters of the blocks' projections (arXiv 2106.09685); all other weights are frozen."""

    rank: Optional[int] = None  # columns of an adapter; null or 0: train the whole model
    alpha: float = 16.0  # the output of an adapter is multiplied by alpha / rank
    # qkv: queries, keys and values; output: attention output; up: MLP input, with the gate; down: MLP output
    targets: list[str] = field(default_factory=lambda: ["qkv", "output", "up", "down"])
    dropout: float = 0.0  # dropout of the input of an adapter


@dataclass
class FinetuneConfig:
    """Training of a part of a model."""

    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class VerifyConfig:
    """Settings of `launcher verify` besides the run."""

    steps: int = 3  # optimizer steps to compare
    device: Device = Device.cpu  # cpu | cuda: device of the layout's ranks; the reference runs on CPU
    report: Optional[str] = None  # JSON file of all results


@dataclass
class PlanConfig:
    """Settings of `launcher plan`, and of the plan before training."""

    enforce: bool = True  # training refuses a run that cannot fit
    tokens: Optional[float] = None  # estimate the days for this number of tokens; null: for training.steps
    # With parallelism.expert: tokens of the rank whose experts get most, divided by the mean of the ranks
    expert_imbalance: float = 1.0
    trace: bool = False  # compare the formulas with the traced modules
    figure: Optional[str] = None  # a .png, .svg or .pdf file


class OnNonfinite(Enum):
    """The update of a step whose gradients are not usable is skipped (`skip`), or the run ends (`stop`)."""

    skip = "skip"
    stop = "stop"


class OnSpike(Enum):
    """Reaction to a spike of the loss or of the gradient norm.

    `warn`: print a warning. `skip`: also skip the update of a step whose gradient norm has a spike.
    `rollback`: continue from the last checkpoint before the spike, without the samples of the spike.
    """

    off = "off"
    warn = "warn"
    skip = "skip"
    rollback = "rollback"


@dataclass
class GuardConfig:
    """Reactions to gradients that are not finite, losses that jump, and replicas that differ."""

    nonfinite: OnNonfinite = OnNonfinite.skip  # skip | stop: steps with NaN, infinite or huge gradients
    max_skips: int = 10  # end the run after this number of skipped steps in a row
    spike: OnSpike = OnSpike.warn
    spike_window: int = 128  # logged steps whose median a step is compared with
    spike_score: float = 8.0  # robust standard deviations above the median that count as a spike
    # Steps between comparisons of the tensors that several ranks hold; they are also compared before every
    # checkpoint. 0: never
    replica_interval: int = 100


@dataclass
class ProfileConfig:
    """A trace of some steps by torch's profiler, and a table of the parts of their time."""

    enabled: bool = False  # `profile=true` on the command line is the same as profile.enabled=true
    first_step: Optional[int] = None  # null: the sixth step of each start, or earlier in a shorter run
    steps: int = 3  # consecutive steps


@dataclass
class LaunchConfig:
    """Supervision of ranks."""

    timeout_minutes: float = 30.0  # end the run if a step, validation or save takes longer
    slow_rank_seconds: float = 60.0  # warn of a rank that the others have waited for during this time
    max_restarts: int = 0  # how often to start again after a rank failed or was killed on this machine


@dataclass
class SlurmConfig:
    """Settings of `launcher submit`; null leaves a setting to the cluster. No shell interprets a value."""

    job_name: str = "launcher"
    partition: Optional[str] = None
    account: Optional[str] = None
    qos: Optional[str] = None
    time: Optional[str] = None  # minutes, [HOURS:]MINUTES:SECONDS or DAYS-HOURS[:MINUTES[:SECONDS]]
    nodes: Optional[str] = None  # null: hardware.nodes; MIN-MAX: any number of nodes in this range
    gpus_per_node: Optional[str] = None  # null: hardware.accelerators_per_node; or TYPE:NUMBER
    cpus_per_task: Optional[int] = None
    mem: Optional[str] = None  # memory of a node, such as 64G
    constraint: Optional[str] = None
    exclude: Optional[str] = None
    reservation: Optional[str] = None
    output: str = "slurm-%j.out"
    tasks: Tasks = Tasks.per_rank
    on_stop: OnStop = OnStop.requeue
    signal_seconds: int = 120  # time before the limit at which the run is stopped and saved
    max_parallel: Optional[int] = None  # jobs of a --multirun that run at the same time
    modules: list[str] = field(default_factory=list)  # modules to load (`module load`)
    environment: dict[str, str] = field(default_factory=dict)  # variables to set
    container: list[str] = field(default_factory=list)  # command that runs `launcher` inside
    python: Optional[str] = None  # Python that runs the job; null: the Python that submits it
    sbatch: list[str] = field(default_factory=list)  # further options, such as --mail-type=END
    srun: list[str] = field(default_factory=list)  # further options, such as --cpu-bind=none


@dataclass
class SubmitConfig:
    dry_run: bool = False  # print the script, submit nothing
    preflight: bool = True  # refuse the job if `launcher preflight` fails; not with dry_run


@dataclass
class RunDirConfig:
    dir: Optional[str] = None  # the run's directory; null: training makes one under runs/


@dataclass
class RunConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    submit: SubmitConfig = field(default_factory=SubmitConfig)
    run: RunDirConfig = field(default_factory=RunDirConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)  # merged over the launcher's DeepSpeed config


@dataclass
class PlannedRunConfig(RunConfig):
    """A run and the format of its plan, for `launcher plan`."""

    format: OutputFormat = OutputFormat.table
    learn: list[str] = field(default_factory=list)  # directories of finished runs: refine the hardware config
    learned: Optional[str] = None  # file of the refined hardware config


@dataclass
class CompareConfig:
    """Settings of `launcher compare` besides the run."""

    layouts: list[str] = field(default_factory=list)  # names of layouts; empty: all layouts
    ranks: int = 4
    steps: int = 8  # timed steps; steps before them measure memory and traffic
    figure: Optional[str] = "compare.png"
    report: Optional[str] = None  # JSON file of all measured and planned values


@dataclass
class ComparedRunConfig(RunConfig):
    """A run and the settings of its comparison, for `launcher compare`."""

    compare: CompareConfig = field(default_factory=CompareConfig)


@dataclass
class GenerateConfig:
    """Settings of `launcher generate`."""

    run: RunDirConfig = field(default_factory=RunDirConfig)
    prompt: str = "import "
    tokenizer: Optional[str] = None  # a tokenizer.json; null: the tokenizer that the run recorded
    max_new_tokens: int = 200
    temperature: float = 0.8  # 0: always the most likely token
    top_k: int = 50  # 0: off
    seed: int = 0


@dataclass
class ReplayConfig:
    """Settings of `launcher replay`: the run, the step to repeat, and the layout."""

    run: RunDirConfig = field(default_factory=RunDirConfig)
    step: Optional[int] = None
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    device: Device = Device.auto
    samples: int = 8  # samples with the highest losses to show


@dataclass
class EvaluateConfig:
    """Settings of `launcher evaluate`: the weights, the data or tasks, and the layout."""

    # In `run.dir`: a run, a checkpoint, the result of `launcher import`, or a Hugging Face directory.
    run: RunDirConfig = field(default_factory=RunDirConfig)
    # Without text, tokens, chats and tasks: the run's own validation data.
    text: Optional[str] = None  # a glob of text files
    tokens: Optional[str] = None  # NAME of NAME.bin and NAME.idx, or a glob
    chats: Optional[str] = None  # conversations as data=chat reads them; what the assistant writes is scored
    tasks: list[str] = field(default_factory=list)  # tasks of lm-evaluation-harness
    task_dir: Optional[str] = None  # a directory with further tasks of lm-evaluation-harness
    few_shot: Optional[int] = None  # examples in the prompt of a task; null: as the task says
    limit: Optional[int] = None  # windows of each source of data, documents of each task; null: all
    sequence_length: Optional[int] = None  # tokens of a window or prompt; null: as the run was trained
    stride: Optional[int] = None  # tokens from a window to the next; null: sequence_length
    micro_batch_size: int = 4  # windows per forward pass of one data-parallel rank
    tokenizer: Optional[str] = None  # a tokenizer.json; null: the tokenizer that the run recorded
    dtype: Optional[Dtype] = None  # null: precision.dtype of the run, fp32 without a run
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    device: Device = Device.auto
    report: Optional[str] = None  # JSON file of all results
    wandb: bool = True  # add the results to the summary of the run's W&B run, if it has one


class TokenizerTraining(Enum):
    """`bpe`: byte-level byte-pair encoding, as GPT-2's."""

    bpe = "bpe"


class BadLines(Enum):
    """At a bad line, `launcher prepare` stops (`fail`) or leaves the line out (`skip`)."""

    fail = "fail"
    skip = "skip"


class EndInText(Enum):
    """How `launcher prepare` treats text that spells the token that ends documents.

    `escape`: the text is encoded as ordinary text; where the tokenizer cannot do so, the line is bad.
    `refuse`: the line is bad. `count`: the document ends there, and such ends are counted.
    """

    escape = "escape"
    refuse = "refuse"
    count = "count"


@dataclass
class TokenizerConfig:
    """The tokenizer: a tokenizer.json, a new one trained on the text, or neither, for bytes."""

    path: Optional[str] = None  # a tokenizer.json of Hugging Face tokenizers
    train: Optional[TokenizerTraining] = None
    train_mb: float = 512.0  # MB (1e6 bytes) of training text, from the start of every file
    # Token that ends each document; null: <|endoftext|> or another usual token.
    end_of_document: Optional[str] = None


@dataclass
class PrepareConfig:
    """Settings of `launcher prepare` besides input and output."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    vocab: int = 32000  # vocabulary size for tokenizer.train
    # Field of a JSON object or column of a Parquet file; a.b: field b in a; a.*: all items of the list a.
    text_field: str = "text"
    chat: bool = False  # records are conversations or pairs of prompt and completion, and not text
    chat_template: Optional[str] = None  # chat: a file with a Jinja template; null: the tokenizer's template
    json_arrays: bool = False  # read JSON arrays of objects, and objects that span lines, in JSON files
    end_of_document_in_text: EndInText = EndInText.escape  # escape | refuse | count: text like the end token
    bad_lines: BadLines = BadLines.fail
    max_line_mb: float = 256.0  # a longer line counts as a bad line; 1e6 bytes
    workers: Optional[int] = None  # processes; null: one per core


@dataclass
class CalibrateConfig:
    """Settings of `launcher calibrate`."""

    name: str = "this_machine"  # name of the hardware config
    dir: str = "my_conf"  # directory for --config-dir; writes DIR/hardware/NAME.yaml
    rounds: int = 5  # repetitions of each measurement of CPU ranks; the median is used
    most_ranks: Optional[int] = None  # null: twice the cores, or all GPUs


@dataclass
class ExchangeConfig:
    """Settings of `launcher export` and `launcher import` besides the two directories."""

    dtype: Optional[Dtype] = None  # null: dtype of the imported model, else fp32; fp32 for an adapter
    merged: bool = False  # LoRA: export the whole model with the adapter added, not the adapter alone
    certificate: bool = True  # compare the export's logits in transformers with the launcher's
    max_file_gb: float = 2.0  # in 1e9 bytes


# The typed root of each file in conf/ that is the root of a command; it is `NAME_schema` in their defaults.
ROOTS: dict[str, type[Any]] = {
    "run": RunConfig,
    "plan": PlannedRunConfig,
    "compare": ComparedRunConfig,
    "generate": GenerateConfig,
    "calibrate": CalibrateConfig,
    "exchange": ExchangeConfig,
    "prepare": PrepareConfig,
    "replay": ReplayConfig,
    "evaluate": EvaluateConfig,
}
