"""Small networks, the U-Nets of published checkpoints, their preconditioning as denoisers, and the model folder."""

from fanal.nets.adm import DhariwalUNet as DhariwalUNet
from fanal.nets.adm import DhariwalUNetConfig as DhariwalUNetConfig
from fanal.nets.edm import SongUNet as SongUNet
from fanal.nets.edm import SongUNetConfig as SongUNetConfig
from fanal.nets.folder import ARCHITECTURES as ARCHITECTURES
from fanal.nets.folder import load_model as load_model
from fanal.nets.folder import read_card as read_card
from fanal.nets.folder import save_model as save_model
from fanal.nets.mlp import MLP as MLP
from fanal.nets.mlp import MLPConfig as MLPConfig
from fanal.nets.preconditioning import PRECONDITIONINGS as PRECONDITIONINGS
from fanal.nets.preconditioning import NetConfig as NetConfig
from fanal.nets.preconditioning import Preconditioned as Preconditioned
from fanal.nets.unet import UNet as UNet
from fanal.nets.unet import UNetConfig as UNetConfig
