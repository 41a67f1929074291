"""`python -m jaxllm`: the command line without an installed script."""

from jaxllm.cli import main

main()
