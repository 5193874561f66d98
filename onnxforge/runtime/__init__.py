"""What runtimes can load, and running models on them."""
