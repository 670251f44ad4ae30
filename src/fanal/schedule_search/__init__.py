"""The parts of a schedule search: jump costs, shortest paths, the fit to the sampler's end, free weights."""

from fanal.schedule_search.cost import METRICS as METRICS
from fanal.schedule_search.cost import cost_matrix as cost_matrix
from fanal.schedule_search.errors import Error as Error
from fanal.schedule_search.errors import error_of as error_of
from fanal.schedule_search.fitting import Fit as Fit
from fanal.schedule_search.fitting import fit as fit
from fanal.schedule_search.paths import shortest as shortest
from fanal.schedule_search.student import Replay as Replay
from fanal.schedule_search.student import Student as Student
from fanal.schedule_search.student import teach as teach
from fanal.schedule_search.tournament import Contest as Contest
from fanal.schedule_search.tournament import starts as starts
from fanal.schedule_search.weights import BySteps as BySteps
from fanal.schedule_search.weights import Weighted as Weighted
from fanal.schedule_search.weights import calls_of as calls_of
from fanal.schedule_search.weights import weights_of as weights_of
