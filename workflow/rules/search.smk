"""Mixed-precision search: the error of each layer at each number of bits, and the recipe that is chosen."""


rule measure_candidates:
    """Measure the error of each layer at the heads, at each number of bits; searches share it."""
    input:
        **detector_input("calibration"),
    output:
        candidates="results/{model}/candidates/{measurement}.json",
    log:
        "logs/measure_candidates/{model}/{measurement}.log",
    benchmark:
        "benchmarks/measure_candidates/{model}/{measurement}.tsv"
    conda:
        "../../envs/qwt.yaml"
    threads: detector_threads
    resources:
        **step_resources("measure_candidates"),
    params:
        **detector_params("measure_candidates"),
        candidates=from_wildcards(SETTINGS.candidates, "measurement"),
    script:
        "../../scripts/measure_candidates.py"


rule choose_recipe:
    """Choose the bits of each layer; for a limit of AP loss, calibrate and evaluate a few recipes."""
    input:
        **detector_input("calibration"),
        candidates=from_wildcards(SETTINGS.measured, "model", "quantization"),
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
        settings=from_wildcards(SETTINGS.searched, "quantization"),
        search=from_wildcards(SETTINGS.entry, "quantization", section="quantization"),
    script:
        "../../scripts/choose_recipe.py"
