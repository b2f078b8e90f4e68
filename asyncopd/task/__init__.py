"""The embedded task, its teacher and student, and how they are trained."""

from asyncopd.task.models import load_student, load_teacher, student_config, teacher_config
from asyncopd.task.railway import Problem, RailwayTask, railway_map
from asyncopd.task.training import train_teacher, warm_up_student

__all__ = [
    "Problem",
    "RailwayTask",
    "load_student",
    "load_teacher",
    "railway_map",
    "student_config",
    "teacher_config",
    "train_teacher",
    "warm_up_student",
]
