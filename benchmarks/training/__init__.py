"""How the bundled models were made, and how to make them again.

    python -m benchmarks.training tokenizer --corpus litbank.txt.xz --out weights
    python -m benchmarks.training gelu-2l --corpus litbank.txt.xz --out weights

`recipe` says what is trained, `dense` is the arithmetic, `measures` what is looked at on the way and
in the end, `run` does it and writes the folder.

With MALLOC_MMAP_THRESHOLD_=4294967296 and MALLOC_TRIM_THRESHOLD_=17179869184 in the environment
glibc keeps freed memory for the next step, which made steps a third faster on two cores. On
cores that others use too, OMP_NUM_THREADS=1 is faster still: no thread waits for another.
"""
