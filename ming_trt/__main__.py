"""`python -m ming_trt`."""

from ming_trt.cli import main

main()
