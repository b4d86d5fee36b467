"""Binarized neural networks that memorize: layers, models, corruption, training, experiments.

The public names stand in `PUBLIC`, each beside the module that holds it, in the order in which
to read them; they are loaded when they are first asked for.
"""

from importlib import import_module

from bnnlib.process import spin_briefly

__version__ = "0.2.0"

spin_briefly()  # before anything here loads PyTorch

PUBLIC = {
    "names": "ACTIVATIONS DATASETS LOSSES NETWORKS OPTIMIZERS QUANTIZERS SIZES use",
    "quantizers": "sign hard_sigmoid binarize binarize_stochastic binary_tanh binary_sigmoid "
    "approx_sign approx_step scaled_sign",
    "layers": "Activation BatchNorm BinaryConv2d BinaryLinear BinarySigmoid BinaryTanh Dropout "
    "binary_layers derive_seed evaluating seed_layers",
    "models": "ARCHITECTURES Architecture binarynet binary_resnet18 count_parameters",
    "losses": "error_rate hinge_loss l2_penalty squared_hinge_loss",
    "optim": "BinaryAdam Bop clip_latent_weights make_optimizer parameter_groups set_rate",
    "data.images": "ImageSet load scale_pixels",
    "corruption": "gaussian_inputs random_labels random_pixels shuffled_pixels",
    "batches": "Batches",
    "packed.packing": "pack",
    "packed.network": "PackedNetwork load_packed",
    "export": "export_onnx",
    "history": "History epochs_to_reach",
    "training": "EvaluationMode TrainingState evaluate fit learning_rates",
    "probes": "binary_weights critical_sample_ratio flip_ratio saturation",
    "experiments.experiment": "Experiment",
    "experiments.originals": "PUBLISHED published",
    "experiments.variants": "CAPACITY VARIANTS named",
    "experiments.profiles": "PROFILES at_profile by_profile full large quick reduced smoke",
    "experiments.build": "build_model prepare_data",
    "runs.record": "profile_of",
    "runs.result": "Run differences",
    "runs.folder": "load_run",
    "runs.ledger": "histories load_runs results stored_runs stored_table write_ledger",
    "runs.evaluation": "evaluate_run",
    "runs.run": "run",
    "sweeps.launch": "sweep",
    "errors": "BnnlibError InvalidValue",
}
_MODULES = {name: module for module, names in PUBLIC.items() for name in names.split()}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'bnnlib' has no name {name!r}")
    value = getattr(import_module(f"bnnlib.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
