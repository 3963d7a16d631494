"""No distillation: the control, which learns from labels alone."""

from tune_kd.study.methods import Method

METHOD = Method("none", needs="nothing")
