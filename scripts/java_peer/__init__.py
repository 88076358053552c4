"""A Java program on ScalarDB 3.19, and how it is compiled, started and steered: for benchmarks and tests."""
