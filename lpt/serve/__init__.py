"""What a prompt file is for once it is there: opened on its backbone, evaluated on a task, asked about images."""

from lpt.serve.evaluating import evaluate_prompt as evaluate_prompt
from lpt.serve.opening import open_prompt as open_prompt
from lpt.serve.predicting import image_files as image_files
from lpt.serve.predicting import predict_files as predict_files
