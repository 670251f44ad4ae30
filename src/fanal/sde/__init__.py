"""Linear processes: between f, g and s, sigma; named ones; and a Denoiser from a network that was trained on one."""

from fanal.sde.linear import LinearProcess as LinearProcess
from fanal.sde.linear import ProcessDenoiser as ProcessDenoiser
from fanal.sde.linear import linear_process as linear_process
from fanal.sde.named import PROCESSES as PROCESSES
from fanal.sde.named import cosine as cosine
from fanal.sde.named import flow as flow
from fanal.sde.named import quadratic as quadratic
from fanal.sde.named import ve as ve
from fanal.sde.named import vp as vp
