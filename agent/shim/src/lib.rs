//! The small program beside the command of a ParDo: rings on one side, standard input and output on the other
