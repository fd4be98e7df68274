"""Quantizations that are questions: what each layer does at each number of bits, and the recipe that answers."""


rule measure_candidates:
    """Measure what each layer does to the heads at each number of bits."""
    input:
        **detector_input("calibration"),
    output:
        candidates="results/{model}/{quantization}/candidates.json",
    log:
        "logs/measure_candidates/{model}/{quantization}.log",
    benchmark:
        "benchmarks/measure_candidates/{model}/{quantization}.tsv"
    conda:
        "../../envs/qwt.yaml"
    threads: detector_threads
    resources:
        **step_resources("measure_candidates"),
    params:
        **detector_params("measure_candidates"),
        settings=of(SETTINGS.searched, "quantization"),
        candidates=of(SETTINGS.candidates, "quantization"),
    script:
        "../../scripts/measure_candidates.py"


rule choose_recipe:
    """Choose the bits of each layer, with a few calibrations where a loss of AP is the limit."""
    input:
        **detector_input("calibration"),
        candidates="results/{model}/{quantization}/candidates.json",
    output:
        recipe="results/{model}/{quantization}/recipe.yaml",
        summary="results/{model}/{quantization}/recipe.json",
    log:
        "logs/choose_recipe/{model}/{quantization}.log",
    benchmark:
        "benchmarks/choose_recipe/{model}/{quantization}.tsv"
    conda:
        "../../envs/qwt.yaml"
    threads: detector_threads
    resources:
        **step_resources("choose_recipe"),
    params:
        **detector_params("choose_recipe"),
        settings=of(SETTINGS.searched, "quantization"),
        search=of(SETTINGS.entry, "quantization", section="quantization"),
    script:
        "../../scripts/choose_recipe.py"
