# shellcheck shell=bash
# What the launchers share; sourced by them.
#
# `run COMMAND...` runs a command, or with dry_run=1 prints it, quoted so that it can be pasted into a shell. Everything
# a launcher does to a cluster goes through it.

# `read_command "$@"` reads COMMAND [NAME] at the head of a launcher's arguments.

dry_run=0
COMMANDS=() # of the launcher
NAMELESS=() # those of them that take no NAME

fail() { # message...: one line on standard error, status 2
  echo "${0##*/}: $*" >&2
  exit 2
}

quoted() { # arguments...: one line that a shell reads as the same arguments
  local argument line=
  for argument in "$@"; do
    if [[ $argument =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      line+=" $argument"
    else
      line+=" '${argument//\'/\'\\\'\'}'"
    fi
  done
  echo "${line# }"
}

run() { # command...
  if [ "$dry_run" = 1 ]; then
    quoted "$@"
  else
    "$@"
  fi
}

one_of() { # what, given, allowed...
  local what=$1 given=$2 allowed
  shift 2
  for allowed in "$@"; do
    [ "$given" != "$allowed" ] || return 0
  done
  fail "$what is '$given'; it must be one of: $*"
}

matches() { # what, given, regular expression, what is allowed in words
  [[ $2 =~ ^$3$ ]] || fail "$1 is '$2'; it must be $4"
}

needed() { # what, given
  [ -n "$2" ] || fail "$1 is missing"
}

value() { # option, and what stands after it
  [ $# -ge 2 ] && [[ $2 != --* ]] || fail "$1 needs a value"
}

usage() { # script: the comment at its head
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$1"
}

allowed() { # option, commands of the launcher that take it...
  local option=$1
  shift
  [[ " $* " == *" $command "* ]] || fail "$option does not belong to $command, but to: $*"
}

# The launcher's arguments: sets `command`, `name`, and `arguments` to the rest.
read_command() {
  if [ $# -eq 0 ] || [ "$1" = --help ] || [ "$1" = -h ]; then
    usage "$0"
    exit $(($# == 0 ? 2 : 0))
  fi
  command=$1 name=''
  shift
  one_of COMMAND "$command" "${COMMANDS[@]}"
  if [[ " ${NAMELESS[*]} " != *" $command "* ]]; then
    name=${1:-}
    matches NAME "$name" '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' \
      "lower-case letters, digits and dashes, at most 40, a letter first"
    shift
  fi
  # shellcheck disable=SC2034  # read by the launcher
  arguments=("$@")
}
