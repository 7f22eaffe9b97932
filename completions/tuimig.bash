# bash completion for tuimig. Made by `python -m tuimig.manual` from the parser. Do not edit.
_tuimig() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} verb= options= values=
    local index
    for ((index = 1; index < COMP_CWORD; index++)); do
        case ${COMP_WORDS[index]} in ps|maps|check|snapshot|restore|clone|move|receive|journals|inspect|verify|demo|replay) verb=${COMP_WORDS[index]}; break;; esac
    done
    case "$verb $before" in
        "ps --user") values=word ;;
        "maps --eager-below") values=word ;;
        "maps --eager") values=word ;;
        "maps --protect") values=word ;;
        "maps --policy") values=file ;;
        "check --tcp") values="close refuse" ;;
        "check --stdio") values=file ;;
        "snapshot --eager-below") values=word ;;
        "snapshot --eager") values=word ;;
        "snapshot --protect") values=word ;;
        "snapshot --policy") values=file ;;
        "snapshot --guard") values="auto on off" ;;
        "snapshot --precopy") values=word ;;
        "snapshot --track") values="auto async" ;;
        "snapshot --max-slowdown") values=word ;;
        "snapshot --freeze-budget") values=word ;;
        "snapshot --tcp") values="close refuse" ;;
        "snapshot --stdio") values=file ;;
        "snapshot --events") values=file ;;
        "snapshot --record") values=file ;;
        "snapshot --report") values=file ;;
        "restore --map-port") values=word ;;
        "restore --map-path") values=word ;;
        "restore --pid-namespace") values="auto new host" ;;
        "restore --tcp") values="close refuse" ;;
        "restore --stdio") values=file ;;
        "restore --events") values=file ;;
        "restore --record") values=file ;;
        "restore --report") values=file ;;
        "clone --eager-below") values=word ;;
        "clone --eager") values=word ;;
        "clone --protect") values=word ;;
        "clone --policy") values=file ;;
        "clone --guard") values="auto on off" ;;
        "clone --precopy") values=word ;;
        "clone --track") values="auto async" ;;
        "clone --max-slowdown") values=word ;;
        "clone --freeze-budget") values=word ;;
        "clone --map-port") values=word ;;
        "clone --map-path") values=word ;;
        "clone --pid-namespace") values="auto new host" ;;
        "clone --tcp") values="close refuse" ;;
        "clone --stdio") values=file ;;
        "clone --remote-command") values=word ;;
        "clone --streams") values=word ;;
        "clone --compress") values="none lz4 zstd" ;;
        "clone --bandwidth") values=word ;;
        "clone --reconnect") values=word ;;
        "clone --on-loss") values="kill poison" ;;
        "clone --events") values=file ;;
        "clone --record") values=file ;;
        "clone --report") values=file ;;
        "move --eager-below") values=word ;;
        "move --eager") values=word ;;
        "move --protect") values=word ;;
        "move --policy") values=file ;;
        "move --guard") values="auto on off" ;;
        "move --precopy") values=word ;;
        "move --track") values="auto async" ;;
        "move --max-slowdown") values=word ;;
        "move --freeze-budget") values=word ;;
        "move --map-port") values=word ;;
        "move --map-path") values=word ;;
        "move --pid-namespace") values="auto new host" ;;
        "move --tcp") values="close refuse" ;;
        "move --stdio") values=file ;;
        "move --remote-command") values=word ;;
        "move --streams") values=word ;;
        "move --compress") values="none lz4 zstd" ;;
        "move --bandwidth") values=word ;;
        "move --reconnect") values=word ;;
        "move --on-loss") values="kill poison" ;;
        "move --events") values=file ;;
        "move --record") values=file ;;
        "move --report") values=file ;;
        "receive --listen") values=word ;;
        "journals --clear") values=word ;;
        "demo --memory") values=word ;;
        "demo --events") values=file ;;
        "demo --record") values=file ;;
        "demo --report") values=file ;;
    esac
    case "$verb" in
        "") options="ps maps check snapshot restore clone move receive journals inspect verify demo replay -h --help --version --pid --read-only --ascii --no-mouse --refresh --theme" ;;
        ps) options="--json --user --all" ;;
        maps) options="--json --eager-below --eager --protect --policy" ;;
        check) options="--json --tcp --stdio --yes" ;;
        snapshot) options="--json --eager-below --eager --protect --policy --guard --precopy --track --max-slowdown --freeze-budget --verify --tcp --stdio --yes --events --record --redact --step --report" ;;
        restore) options="--json --full --map-port --map-path --pid-namespace --tcp --stdio --yes --events --record --redact --step --report" ;;
        clone) options="--json --eager-below --eager --protect --policy --guard --precopy --track --max-slowdown --freeze-budget --verify --full --map-port --map-path --pid-namespace --tcp --stdio --yes --remote-command --streams --compress --bandwidth --reconnect --on-loss --events --record --redact --step --report" ;;
        move) options="--json --eager-below --eager --protect --policy --guard --precopy --track --max-slowdown --freeze-budget --verify --full --map-port --map-path --pid-namespace --tcp --stdio --yes --remote-command --streams --compress --bandwidth --reconnect --on-loss --events --record --redact --step --report" ;;
        receive) options="--json --stdio --listen" ;;
        journals) options="--json --clear --yes" ;;
        inspect) options="--json" ;;
        verify) options="--json" ;;
        demo) options="--json --list --no-console --memory --events --record --redact --step --report" ;;
        replay) options="--json --no-console" ;;
    esac
    if [[ -z $values && $word != -* ]]; then case "$verb" in
        maps) values=pid ;;
        check) values=pid ;;
        snapshot) values=pid
            [[ $before == snapshot ]] || values=dir ;;
        restore) values=dir ;;
        clone) values=pid
            [[ $before == clone ]] || values=word ;;
        move) values=pid
            [[ $before == move ]] || values=word ;;
        inspect) values=dir ;;
        verify) values=dir ;;
        demo) values="counter canvas kv churn hog redis" ;;
        replay) values=file
            [[ $before == replay ]] || values=file ;;
    esac; fi
    case "$values" in
        "") COMPREPLY=($(compgen -W "$options" -- "$word")) ;;
        file) compopt -o filenames; COMPREPLY=($(compgen -f -- "$word")) ;;
        dir) compopt -o filenames; COMPREPLY=($(compgen -d -- "$word")) ;;
        pid) COMPREPLY=($(cd /proc && compgen -W "$(echo [0-9]*)" -- "$word")) ;;
        word) COMPREPLY=() ;;
        *) COMPREPLY=($(compgen -W "$values" -- "$word")) ;;
    esac
}
complete -F _tuimig tuimig
