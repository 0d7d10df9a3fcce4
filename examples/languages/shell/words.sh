#!/bin/sh
# One line for each word, with its length: argo-streams conform --expect flatmap -- sh words.sh
# mawk, which is Debian's awk, reads its input in blocks: the last lines are answered when a block is full, or at the end.
LC_ALL=C exec awk '{ for (at = 1; at <= NF; at++) print length($at), $at }'
