"""Solvers."""
from .dpm_solver import dpmpp_2m
